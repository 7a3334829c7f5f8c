"""Files of scores that hold something else, or the scores of somebody else."""

from __future__ import annotations

import polars as pl
import pytest

from tutelage.errors import UserError
from tutelage.evals.score_files import add_documents


def frame(losses, version="a"):
    count = len(losses)
    names = {"domain": ["in"] * count, "split": ["test"] * count, "version": [version] * count}
    return pl.DataFrame({**names, "document": list(range(count)), "nats": losses})


@pytest.mark.parametrize("name", ["run", "run[1]", "ru?"])
def test_losses_replace_those_of_the_same_version_alone(tmp_path, name):
    """Where a name could be read as a pattern too, which fits another run's file."""
    for other in dict.fromkeys(("run1", name)):
        (tmp_path / other).mkdir()
    add_documents(tmp_path / "run1" / "documents.parquet", frame([9.0], version="c"))
    path = tmp_path / name / "documents.parquet"
    add_documents(path, frame([1.0, 2.0]))
    add_documents(path, frame([5.0], version="b"))
    add_documents(path, frame([3.0, 4.0]))
    found = pl.read_parquet(path, glob=False).sort("version", "document")
    assert found["nats"].to_list() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize("what", ["text", "other columns", "columns of another kind"])
def test_a_file_that_holds_no_losses_is_named_and_left(tmp_path, what):
    path = tmp_path / "documents.parquet"
    if what == "text":
        path.write_text("precious", encoding="utf-8")
    elif what == "other columns":
        pl.DataFrame({"name": ["precious"]}).write_parquet(path)
    else:
        frame([1.0]).with_columns(domain=pl.lit(7)).write_parquet(path)
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        add_documents(path, frame([1.0]))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: documents.parquet: holds no losses of documents (")
    assert message.endswith(
        "delete scores.jsonl, documents.parquet and calibration.json there, and evaluate again"
    )
    assert len(message.splitlines()) == 1
    assert path.read_bytes() == before
