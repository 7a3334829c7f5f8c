from __future__ import annotations

import dataclasses
import json

import pytest

from tutelage.errors import UserError
from tutelage.identity import run_id
from tutelage.study.cells import Cell
from tutelage.study.graph import Node
from tutelage.study.runner import run_all


class Quiet:
    """Remembers the largest number of runs that went on at the same time."""

    most = 0

    def show(self, nodes, running, finished, failed):
        self.most = max(self.most, len(running))


def node(config, needs=()):
    cell = Cell(config.name, "baseline", "test", "tiny", None, None, None, config.seed, "nano-50k", 1, {})
    return Node(run_id(config), cell, config, needs, None, 1, 1, 1.0, 0.0)


def status(one):
    return json.loads((one.config.output / one.id / "state.json").read_text())["status"]


def test_runs_wait_for_what_they_need_and_failures_stop_only_dependants(make_config):
    teacher = node(make_config(name="teacher", seed=7))
    broken = node(make_config(name="broken", optim={"lr": 1e30, "clip": 1e30, "warmup": 0.0}))

    def student(of):
        config = make_config(
            name=f"of-{of.config.name}", teacher={"kind": "run", "run": of.id}, objective={"alpha": 0.5}
        )
        return node(config, (of.id,))

    taught, orphan = student(teacher), student(broken)
    watcher = Quiet()
    with pytest.raises(UserError, match="2 of 4 runs failed") as caught:
        run_all([taught, orphan, broken, teacher], 2, watcher)
    assert "lower optim.lr" in str(caught.value)
    assert f"needs {broken.id}" in str(caught.value)
    assert status(teacher) == status(taught) == "done"
    assert status(broken) == "failed"
    assert watcher.most == 2


def test_number_of_workers_does_not_change_results(make_config, tmp_path):
    first = [node(make_config(seed=seed)) for seed in (1, 2)]
    second = [
        dataclasses.replace(one, config=one.config.model_copy(update={"output": tmp_path / "other"}))
        for one in first
    ]
    run_all(first, 2, Quiet())
    run_all(second, 1, Quiet())
    for a, b in zip(first, second, strict=True):
        assert a.id == b.id
        files = [one.config.output / one.id / "model" / "model.safetensors" for one in (a, b)]
        assert files[0].read_bytes() == files[1].read_bytes()
