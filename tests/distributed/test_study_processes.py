"""A study here whose runs take two processes each: a killed rank is retried, results are those of one."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest
from training import assert_same_weights, rows

from tutelage.progress import NullProgress
from tutelage.provenance import command
from tutelage.run_directory import run_id
from tutelage.study.cells import Cell
from tutelage.study.engines.local import LocalEngine
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import Cost, Node
from tutelage.study.runner import run_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]


def node(config, needs=()):
    labels = {"group": "test", "student": "tiny", "teacher": None, "shape": "nano-50k"}
    cell = Cell(name=config.name, kind="student", seed=config.seed, tokens=1, settings={}, **labels)
    return Node(run_id(config), cell, config, needs, Cost(1, 1, 1.0, 0.0))


def variables(pid):
    """Environment of a process of ours."""
    try:
        texts = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(text.split("=", 1) for text in texts if "=" in text)


class Murder(NullProgress):
    """Kills rank 1 of the first job that has one, once."""

    def __init__(self, mark):
        self.mark, self.killed = mark, None

    def advance(self, stage, done):
        for path in Path("/proc").glob("[0-9]*"):
            found = variables(path.name)
            if self.killed is None and found.get("TUTELAGE_TEST") == self.mark and found.get("RANK") == "1":
                self.killed = int(path.name)
                os.kill(self.killed, signal.SIGKILL)


def test_runs_of_two_processes_survive_a_kill_and_equal_those_of_one(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TUTELAGE_TEST", str(tmp_path))
    forkserver._forkserver._stop()  # an earlier test's has not this in its environment

    def study(folder, processes):
        common = {"parallel": {"processes": processes}, "output": str(tmp_path / folder / "runs")}
        teacher = make_config(name="teacher", seed=7, **common)
        taught = {"teacher": {"kind": "run", "run": run_id(teacher)}, "objective": {"alpha": 0.5}}
        student = make_config(name="student", seed=1, **taught, **common)
        return [node(teacher), node(student, (run_id(teacher),))]

    progress, results = Murder(str(tmp_path)), {}
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        nodes = study(folder.name, processes)
        with LocalEngine(2, []) as engine, Leases(folder, 0.5) as leases:
            run_all(
                nodes, engine, leases, Failures(folder, 1), progress if processes == 2 else NullProgress()
            )
        results[processes] = nodes
    (failures,) = (tmp_path / "2" / "queue" / "failures").glob("*.json")
    attempts = json.loads(failures.read_text())["attempts"]
    assert [one["error"] for one in attempts] == [
        "rank 1: its process ended by signal SIGKILL (out of memory?)"
    ]
    for two, one in zip(results[2], results[1], strict=True):
        assert two.id == one.id
        losses = ([row["loss"] for row in rows(each.directory)] for each in (two, one))
        assert next(losses) == pytest.approx(next(losses), rel=1e-5)
        # AdamW divides by the root of a moment that is nearly 0 for an entry here and there.
        assert_same_weights(two.directory, one.directory, rtol=1e-3, atol=2e-3)
        states = [json.loads((each.directory.path / "state.json").read_text()) for each in (two, one)]
        assert [state["status"] for state in states] == ["done", "done"]
        made = json.loads((two.directory.path / "provenance.json").read_text())
        assert made["command"] == command()
