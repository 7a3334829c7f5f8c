"""Tables of models in a terminal."""

from dataclasses import asdict, replace

from rich.console import Console

from tutelage.analysis.report.text import print_scores, print_tasks
from tutelage.types import Score


def score(model, value, version="1"):
    return Score(
        run=model, step=1, tokens=1, domain="copying", role="probe", split="test", metric="accuracy",
        value=value, stderr=0.01, n=64, higher_is_better=True, version=version,
    )  # fmt: skip


def test_many_models_are_shown_a_few_at_a_time_and_the_best_of_all_is_marked():
    console = Console(width=120, record=True)

    print_tasks([score(f"model-{i}", i / 10) for i in range(6)], "probe", "sequences", console)
    tables = console.export_text().split("\n\n")

    assert len(tables) == 2
    assert all(f"model-{i}" in tables[0] for i in range(4))
    assert all(f"model-{i}" in tables[1] for i in (4, 5))
    assert "0.500 ± 0.010 (n=64) *" in tables[1]
    assert "*" not in tables[0]
    assert tables[1].count("Value ± standard error") == 1


def test_scores_that_were_not_measured_alike_stand_in_rows_of_their_own_and_are_named():
    scores = [score("a", 0.3), score("b", 0.2), score("c", 0.1, version="2")]
    texts = [
        asdict(replace(one, metric="bits_per_byte", domain="kjv", role="out_of_domain")) for one in scores
    ]
    for show in (
        lambda console: print_tasks(scores, "probe", "sequences", console),
        lambda console: print_scores(texts, {}, console),
    ):
        console = Console(width=160, record=True)
        show(console)
        lines = console.export_text().splitlines()
        rows = [line.split()[-12:] for line in lines if "0." in line]
        assert len(rows) == 2
        assert "0.1" not in " ".join(rows[0])
        assert rows[1].count("-") == 2
        (note,) = (line for line in lines if "not side by side" in line)
        assert note.endswith("a, b; c")
