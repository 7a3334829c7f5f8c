"""Files of scores that hold something else, or the scores of somebody else."""

from __future__ import annotations

import polars as pl
import pytest

from tutelage.errors import UserError
from tutelage.evals.score_files import add_documents, add_scores, last_bits_per_byte
from tutelage.types import Score


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


def test_a_task_that_is_called_as_a_text_is_takes_no_place_of_its_scores(tmp_path):
    """lm-eval has tasks with bits per byte, of documents and by rules of its own."""
    (tmp_path / "model").mkdir()
    card = tmp_path / "model" / "README.md"
    card.write_text("## Scores\n", encoding="utf-8")
    rows = [
        Score("run", 7, 900, "scripture", role, "test", "bits_per_byte", value, 0.1, 4, False, version)
        for role, value, version in (("out_of_domain", 4.25, "2-a"), ("downstream", 4.75, "2-b"))
    ]
    add_scores(tmp_path / "scores.jsonl", rows)
    assert last_bits_per_byte(rows) == {("scripture", "2-a"): 4.25}
    assert [value in card.read_text(encoding="utf-8") for value in ("4.25", "4.75")] == [True, True]
