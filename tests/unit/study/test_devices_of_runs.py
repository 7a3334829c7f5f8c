"""Runs of several processes get as many of an engine's places, and wait until they are free."""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_study import run_tiny, tiny_study

from tutelage.errors import UserError
from tutelage.progress import NullProgress
from tutelage.run_directory import run_id
from tutelage.study.cells import Cell
from tutelage.study.engines import StoreTask, TaskOutcome, tasks
from tutelage.study.engines.local import LocalEngine
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import Cost, Node
from tutelage.study.runner import MemoryRoom, RunnerState, cohort_key, needed, run_all

COSTS = {"a": 3.0, "b": 2.0, "c": 1.0}


class Places:
    """An engine that notes which runs it was given, and ends them when told to."""

    def __init__(self, slots, memory=math.inf):
        self.slots = self.largest = slots
        self.running = {}
        self.memory = memory

    def free_memory(self):
        return self.memory

    def start(self, key, task):
        self.running[key] = task
        assert sum(one.processes for one in self.running.values()) <= self.slots

    def end(self, state, name):
        key = next(key for key, task in self.running.items() if task.configs[0].name == name)
        del self.running[key]
        state.settle({key: TaskOutcome(status="done")})

    @property
    def names(self):
        return [[config.name for config in task.configs] for task in self.running.values()]


def node(make_config, name, processes, cost, kind="baseline", seed=1):
    config = make_config(name=name, seed=seed, parallel={"processes": processes})
    labels = {"group": "test", "student": "tiny", "teacher": None, "shape": "nano-50k"}
    cell = Cell(name=name, kind=kind, seed=seed, tokens=1, settings={}, **labels)
    return Node(run_id(config), cell, config, (), Cost(cost, 1, 1.0, 0.0))


def test_a_large_run_waits_for_its_places_and_those_behind_it_wait_too(make_config, tmp_path):
    nodes = [
        node(make_config, "first", 2, 9.0, seed=1),
        node(make_config, "large", 4, 8.0, seed=2),
        node(make_config, "small", 1, 7.0, seed=3),
        node(make_config, "last", 3, 6.0, seed=4),
    ]
    engine = Places(4)
    with Leases(tmp_path, 0.2) as leases:
        state = RunnerState(nodes, engine, leases, Failures(tmp_path, 0), cohort=1)
        steps = []
        for name in ("first", "large", "small", "last"):
            state.refresh()
            state.start_ready()
            steps.append(engine.names)
            engine.end(state, name)
    assert steps == [[["first"]], [["large"]], [["small"], ["last"]], [["last"]]]


def test_a_cohort_is_as_large_as_leaves_no_places_empty(make_config, tmp_path):
    nodes = [node(make_config, f"s{seed}", 2, 1.0, "student", seed) for seed in range(4)]
    engine = Places(4)
    with Leases(tmp_path, 0.2) as leases:
        state = RunnerState(nodes, engine, leases, Failures(tmp_path, 0), cohort=4)
        state.refresh()
        state.start_ready()
    assert [len(names) for names in engine.names] == [2, 2]


def test_runs_wait_for_memory_as_they_do_for_places(make_config, tmp_path):
    """Each was checked as if it were alone: in a group of 2 GB two were killed, tried again and given up."""
    nodes = [node(make_config, name, 1, cost, seed=seed) for seed, (name, cost) in enumerate(COSTS.items())]
    each = needed(nodes[:1])
    engine = Places(4, 2.5 * each)
    with Leases(tmp_path, 0.2) as leases:
        state = RunnerState(nodes, engine, leases, Failures(tmp_path, 0), cohort=1)
        steps = []
        for name in COSTS:
            state.refresh()
            state.start_ready()
            steps.append(engine.names)
            engine.end(state, name)
        assert steps == [[["a"], ["b"]], [["b"], ["c"]], [["c"]]]
        assert len(state.room.notes) == 1
        assert "c waits until others have ended: it needs " in state.room.notes[0]


def test_a_run_that_nothing_runs_beside_starts_however_much_it_needs(make_config, tmp_path):
    """It is refused there, with a table of what to turn."""
    nodes = [node(make_config, name, 1, cost, seed=seed) for seed, (name, cost) in enumerate(COSTS.items())]
    engine = Places(4, 1.0)
    with Leases(tmp_path, 0.2) as leases:
        state = RunnerState(nodes, engine, leases, Failures(tmp_path, 0), cohort=1)
        state.refresh()
        state.start_ready()
    assert engine.names == [["a"]]
    alone, waits = state.room.notes
    assert "and a may need " in alone
    assert "so b waits until others have ended" in waits


def test_a_run_waits_for_memory_that_other_programs_have_taken_meanwhile(make_config, tmp_path):
    nodes = [node(make_config, name, 1, cost, seed=seed) for seed, (name, cost) in enumerate(COSTS.items())]
    each = needed(nodes[:1])
    room = MemoryRoom(free := mock.Mock(return_value=9 * each))
    assert room.fitting(nodes[:1]) == nodes[:1]
    room.take("first", nodes[:1])
    free.return_value = 0.9 * each
    assert room.fitting(nodes[1:2]) == []
    free.return_value = 1.1 * each
    assert room.fitting(nodes[1:2]) == nodes[1:2]


def test_a_cohort_is_no_larger_than_fits_into_memory(make_config, tmp_path):
    nodes = [node(make_config, f"s{seed}", 1, 1.0, "student", seed) for seed in range(4)]
    engine = Places(1, needed(nodes[:3]) + 1)
    with Leases(tmp_path, 0.2) as leases:
        state = RunnerState(nodes, engine, leases, Failures(tmp_path, 0), cohort=4)
        state.refresh()
        state.start_ready()
    assert [len(names) for names in engine.names] == [3]
    assert "s0 and 2 more train together, not 4: they need " in state.room.notes[0]


def test_runs_with_other_processes_are_no_cohort(make_config):
    one, two = (node(make_config, "s", processes, 1.0, "student") for processes in (1, 2))
    assert one.id == two.id  # the number does not change the result
    assert cohort_key(one) != cohort_key(two)


def test_a_run_that_no_machine_here_can_hold_is_refused_before_anything_runs(make_config, tmp_path):
    nodes = [node(make_config, "large", 3, 1.0)]
    with (
        LocalEngine(2, []) as engine,
        Leases(tmp_path, 0.2) as leases,
        pytest.raises(UserError, match=r"parallel\.processes = 3, but only 2 can") as caught,
    ):
        run_all(nodes, engine, leases, Failures(tmp_path, 0), NullProgress())
    assert nodes[0].id in str(caught.value)


def test_a_run_has_no_more_processes_than_there_are_gpus():
    assert LocalEngine(4, ["0", "1"]).largest == 2
    assert LocalEngine(1, ["0", "1"]).largest == 1
    assert LocalEngine(3, []).largest == 3


def test_a_study_is_not_started_by_torchrun(tmp_path, monkeypatch):
    """Its runs would each wait for processes of another study."""
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"one of 2 \(WORLD_SIZE\).* without torchrun"):
        run_tiny(tiny_study(), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps other things")
def test_a_worker_gives_the_memory_of_an_ended_run_back(monkeypatch):
    """It kept .5 GB of a run of .8 that had ended, and the next runs had to wait for each other."""
    last = []

    def run(*_):
        for _ in range(2):  # the allocator learns how large the pieces are, and keeps the second ones
            pieces = [torch.ones(2**18) for _ in range(300)]
            last.append(torch.ones(2**18))  # what lies last and is still used keeps all before it
            del pieces
        grown.append(own_memory() - before)
        return TaskOutcome(status="done")

    monkeypatch.setattr(tasks, "_execute", run)
    tasks._give_back_memory()  # of other tests, whose place the pieces would take
    before, grown = own_memory(), []
    text = {"name": "text", "sources": [{"kind": "corpus", "name": "sotu"}]}
    task = StoreTask(config=text, directory=Path("x"))
    assert "done" in tasks.execute(task.model_dump_json())
    assert grown[0] > 200 * 2**20
    assert own_memory() - before < 50 * 2**20


def own_memory():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
