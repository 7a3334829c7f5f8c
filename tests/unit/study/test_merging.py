"""Results of one study from several machines: their run directories, put side by side."""

from __future__ import annotations

import shutil

from tiny_study import run_tiny, tiny_study

from tutelage.study.results import load_results


def small_files(source, target):
    """What a report needs of a run: everything but its weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model", "checkpoints", "lock"))


def test_runs_of_another_machine_are_not_trained_again(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run_tiny(tiny_study(seeds=[43]), here)
    run_tiny(tiny_study(seeds=[44]), there)
    alone = load_results(there)
    for run in (there / "runs").iterdir():
        if not (here / "runs" / run.name).exists():
            small_files(run, here / "runs" / run.name)

    run_tiny(tiny_study(seeds=[43, 44]), here)

    merged = load_results(here)
    assert merged.problems == ()
    assert merged.runs["status"].to_list() == ["done"] * 5  # a teacher, and two students of each seed
    copied = [run for run in alone.runs["run"] if "-s44-" in run]
    assert len(copied) == 2
    for run in copied:
        assert not (here / "runs" / run / "model").exists()
        assert merged.scores.filter(run=run).equals(alone.scores.filter(run=run))
