"""Tables and figures of a token comparison, from result files alone."""

from __future__ import annotations

import json

import polars as pl
import pytest
from rich.console import Console
from token_files import FACTS, write

from tutelage.analysis.figures.style import save_all
from tutelage.analysis.figures.token_figures import comparison_figures
from tutelage.analysis.report.text import print_token_comparison
from tutelage.errors import UserError
from tutelage.study.token_tables import read_token_comparison


def printed(found):
    console = Console(width=130, record=True)
    print_token_comparison(found, console)
    return " ".join(console.export_text().split())


def test_the_table_gives_gain_and_interval_of_every_cell_but_positions(tmp_path):
    words = printed(read_token_comparison(write(tmp_path)))
    half = 2.776445 * 0.01  # t with 4 degrees of freedom
    parts = [
        "speeches, test split, 1,000 tokens of 5 documents",
        f"all tokens 100.0% -0.180 +0.170 ± {half:.3f} +0.170 ± {half:.3f}",
        "baseline entropy (nats) 0.00 to 1.00 20.0%",
        f"4.00 to 5.00 20.0% -4.180 +4.170 ± {half:.3f}",
        "highest minus lowest +0.170",
        "first choice right teacher only 25.0%",
        "baseline only 25.0% 1.180 -1.170",
        "probability of the token teacher closer 50.0%",
        "Sort them by a third model (--sorter)",
    ]
    places = [words.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    assert "95%  " not in words


def test_tokens_sorted_by_a_third_model_are_said_to_be(tmp_path):
    write(tmp_path)
    (tmp_path / "comparison.json").write_text(json.dumps(FACTS | {"sorter": "alone-4"}))
    found = read_token_comparison(tmp_path)

    words = printed(found)
    assert "sorter entropy (nats)" in words
    assert "teacher minus sorter" in words
    assert "Tokens are sorted by a third model" in words
    assert "--sorter" not in words
    figures = {figure.name: figure for figure in comparison_figures(found)}
    assert "the sorter's entropy" in figures["entropy"].caption


def test_one_document_has_no_interval(tmp_path):
    found = read_token_comparison(write(tmp_path, stderr=None, documents=1))
    assert found.groups["low95"].null_count() == found.groups.height
    assert "all tokens 100.0% -0.180 +0.170 +0.170" in printed(found)
    entropy, *_ = comparison_figures(found)
    assert "<svg" in save_all([entropy], tmp_path / "figures")["entropy"]


def test_every_figure_becomes_files_with_its_numbers(tmp_path):
    figures = comparison_figures(read_token_comparison(write(tmp_path)))
    drawings = save_all(figures, tmp_path / "figures")
    names = ("entropy", "position", "right", "models", "pairs")
    assert {file.name for file in (tmp_path / "figures").glob("[a-z]*")} == {
        f"{name}.{suffix}" for name in names for suffix in ("svg", "png", "csv")
    }
    assert "lead of the teacher" in drawings["entropy"]
    assert "25%" in drawings["right"]
    rows = {figure.name: figure.data for figure in figures}
    assert rows["entropy"].height == 2 * 5
    assert rows["position"].height == 2 * 20
    assert rows["right"].height == 4 + 2
    assert rows["models"].height == 5 * 7 * 3
    assert rows["pairs"].height == 5 * 7 * 3


def test_both_directions_of_kl_are_told_apart(tmp_path):
    data = {figure.name: figure.data for figure in comparison_figures(read_token_comparison(write(tmp_path)))}
    cells = pl.read_parquet(tmp_path / "summary.parquet").filter(grouping="entropy", bin=2, quantity="kl")
    for quantity, of in (("kl", "student.baseline"), ("reverse", "baseline.student")):
        drawn = data["pairs"].filter(quantity=quantity, of="student, baseline", bin=2)
        assert drawn["mean"].to_list() == cells.filter(of=of)["mean"].to_list()


@pytest.mark.parametrize(
    ("name", "content"),
    [("comparison.json", "{"), ("comparison.json", "{}"), ("summary.parquet", "no parquet")],
)
def test_damaged_results_are_one_clear_line(tmp_path, name, content):
    write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="no finished token comparison") as caught:
        read_token_comparison(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_results_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no finished token comparison"):
        read_token_comparison(tmp_path / "nothing")
