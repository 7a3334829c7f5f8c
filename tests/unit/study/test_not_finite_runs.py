"""A run of a study whose numbers are not finite ends alone: the others go on, and nothing is made of it."""

from __future__ import annotations

import re

import pytest
from tiny_study import TINY, run_tiny, tiny_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.html import build_report
from tutelage.errors import UserError
from tutelage.run_directory import RunDirectory
from tutelage.study.results import load_results
from tutelage.verify import verify


@pytest.mark.slow
def test_others_go_on_and_no_number_is_made_of_it(tmp_path):
    grid = {"product": {"teacher": ["weak"], "alpha": [0.4], "lr": [2e-3, 1e12]}}
    study = tiny_study(students={"main": TINY["students"]["main"] | {"grid": grid}})

    with pytest.raises(UserError) as caught:
        run_tiny(study, tmp_path)

    results = load_results(tmp_path)
    unfinished = results.unfinished
    states = {path.name: RunDirectory(path) for path in (tmp_path / "runs").iterdir()}
    bad = [name for name, run in states.items() if run.status() == "failed"]
    assert bad
    assert {name for name, run in states.items() if run.is_done()} == states.keys() - set(bad)
    assert len(states) - len(bad) >= 3  # teacher, baseline and student of the usual learning rate
    assert sorted(unfinished.filter(status="failed")["run"]) == sorted(bad)
    assert any(name in str(caught.value) for name in bad)
    for name in bad:
        error = str(states[name].state()["error"])
        assert "were skipped" in error
        assert "optim.lr" in error
        assert "\n" not in error
        assert not states[name].model.exists()
    assert not set(results.scores["run"]) & set(bad)
    page = build_report(judge_study(results), tmp_path)
    for shown in (page, *(tmp_path / "tables").glob("*.csv")):
        text = shown.read_text().replace("loss is nan, gradient norm nan", "")  # what they died of
        assert not re.search(r"\b(nan|inf|infinity)\b", text, re.IGNORECASE), shown
    assert [one.path for one in verify(tmp_path, lambda _: None) if one.wrong] == []
