"""Tables of models in a terminal."""

from rich.console import Console

from tutelage.analysis.scoretable import print_tasks
from tutelage.types import Score


def score(model, value):
    return Score(
        run=model, step=1, tokens=1, domain="copying", role="probe", split="test", metric="accuracy",
        value=value, stderr=0.01, n=64, higher_is_better=True, version="1",
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
