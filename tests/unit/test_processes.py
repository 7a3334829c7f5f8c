"""Which process this is, is read from the variables that torchrun and Slurm set."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from tutelage import processes
from tutelage.agreement import meeting_place
from tutelage.errors import UserError
from tutelage.launch import launch
from tutelage.processes import Place, adopt_slurm, cores, first_node, place, tasks_on_node
from tutelage.study.engines.local import default_workers

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "71234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, and none of the others that are read."""

    def variables(values):
        for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.mark.parametrize("alone", [{}, {"RANK": "1"}, {"RANK": "3", "LOCAL_RANK": "3"}, {"WORLD_SIZE": "1"}])
def test_a_process_alone_is_the_main_one_whatever_its_rank(alone, environment):
    environment(alone)
    assert place() == Place(0, 0, 1)
    assert place().is_main


def test_torchruns_variables_are_read(environment):
    environment(TORCHRUN)
    assert place() == Place(rank=5, local_rank=1, size=8)
    environment(TORCHRUN | {"LOCAL_WORLD_SIZE": "2"})
    assert place() == Place(rank=5, local_rank=1, size=8, local_size=2)
    assert not place().is_main


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": ""}, "not RANK:"),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "not LOCAL_RANK, MASTER_PORT:"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"RANK": "9" * 5000}, "RANK=9"),
        ({"RANK": "8"}, "RANK=8 must be less than WORLD_SIZE=8"),
    ],
)
def test_what_is_missing_or_wrong_is_named(changes, named, environment):
    environment(TORCHRUN | changes)
    with pytest.raises(UserError, match=named) as error:
        place()
    assert "\n" not in str(error.value)


def test_tasks_of_srun_become_processes():
    variables = dict(SRUN)
    adopt_slurm(variables)
    assert {name: variables[name] for name in variables.keys() - SRUN.keys() - {"MASTER_PORT"}} == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
    }
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    adopt_slurm(other)
    assert other["MASTER_PORT"] == variables["MASTER_PORT"]
    assert 15_000 <= int(other["MASTER_PORT"]) < 25_000
    next_step = SRUN | {"SLURM_STEP_ID": "3"}
    adopt_slurm(next_step)
    assert next_step["MASTER_PORT"] != other["MASTER_PORT"]


@pytest.mark.parametrize(
    ("counts", "node", "tasks"),
    [("4", 0, 4), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("1,2(x2),5", 2, 2), ("", 0, 1), ("2(x3)", 3, 1)],
)
def test_tasks_of_a_node_are_read_from_slurms_list(counts, node, tasks):
    assert tasks_on_node(counts, node) == tasks


@pytest.mark.parametrize("wrong", [{"SLURM_PROCID": ""}, {"SLURM_JOB_ID": "7_1"}])
def test_a_variable_of_srun_that_is_no_number_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        adopt_slurm(SRUN | wrong)


def test_what_is_set_stays():
    variables = SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "123"}
    adopt_slurm(variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("here", "123")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script's own command
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | TORCHRUN,
    ],
)
def test_one_task_and_torchruns_processes_stay_as_they_are(variables):
    before = dict(variables)
    adopt_slurm(variables)
    assert variables == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-08,11]", "gpu07"),
        ("gpu[3]-ib,login", "gpu3-ib"),
        ("gpu-a[10,12]", "gpu-a10"),
    ],
)
def test_the_first_node_of_a_list_is_found(nodes, first):
    assert first_node(nodes) == first


def test_no_other_module_reads_these_variables():
    source = Path(processes.__file__).parent
    readers = [
        path.name
        for path in source.rglob("*.py")
        if any(f'"{name}"' in path.read_text(encoding="utf-8") for name in TORCHRUN)
    ]
    assert readers == ["processes.py"]


def test_a_start_of_processes_leaves_nothing_behind(tmp_path, monkeypatch):
    """torch's launcher left a directory for each start, so two or more for every run of a study."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert launch(1, ["keyword"]) == {}  # a module of Python's that does nothing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="cores are taken away on Linux alone")
def test_a_study_takes_the_cores_that_it_was_given():
    """Slurm gives a job some of a machine's; a worker for each of the machine's would share them."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert (cores(), default_workers()) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)


def test_a_port_that_another_program_has_is_the_reason_that_is_named(environment):
    with socket.create_server(("", 0)) as taken:
        here = {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        environment(TORCHRUN | here)
        with pytest.raises(UserError, match=r"^the other processes of 8 were not found .*EADDRINUSE"):
            meeting_place()
