from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
from tiny_study import run_tiny, tiny_study

from tutelage.config.data_config import StoreConfig
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.processes import cores
from tutelage.progress import NullProgress
from tutelage.run_directory import run_id
from tutelage.study.cells import Cell
from tutelage.study.engines import StoreTask, TaskOutcome, local
from tutelage.study.engines.local import LocalEngine
from tutelage.study.leases import Failures, Leases, ask_to_stop
from tutelage.study.nodes import Cost, Node
from tutelage.study.runner import run_all


class Recorded(NullProgress):
    """Remembers how many runs went on at most here, and how many were finished at last."""

    def __init__(self):
        self.runs, self.running = set(), set()
        self.most = self.done = 0

    def start(self, stage, total=None, unit="", done=0):
        if total == 1.0:  # the stage of all runs has their work as its total
            self.runs.add(stage)

    def describe(self, stage, figures):
        if stage in self.runs and "elsewhere" not in figures.get("where", ""):
            self.running.add(stage)
        self.most = max(self.most, len(self.running))
        self.done = figures.get("done", self.done)

    def finish(self, stage, outcome="done"):
        self.running.discard(stage)


def node(config, needs=(), kind="baseline"):
    cell = Cell(
        name=config.name,
        kind=kind,
        group="test",
        student="tiny",
        teacher=None,
        seed=config.seed,
        shape="nano-50k",
        tokens=1,
        settings={},
    )
    return Node(run_id(config), cell, config, needs, Cost(1, 1, 1.0, 0.0))


def taught(make_config, teacher, alpha, **changes):
    settings = {"teacher": {"kind": "run", "run": teacher.id}, "objective": {"alpha": alpha}} | changes
    return node(make_config(name=f"alpha-{alpha}", **settings), (teacher.id,), "student")


def run(nodes, folder, progress=None, workers=2, retries=1, cohort=1):
    with LocalEngine(workers, []) as engine, Leases(folder, 0.2) as leases:
        run_all(nodes, engine, leases, Failures(folder, retries), progress or Recorded(), cohort)


def status(one):
    return json.loads((one.config.output / one.id / "state.json").read_text())["status"]


def weights(one):
    return (one.config.output / one.id / "model" / "model.safetensors").read_bytes()


def elsewhere(nodes, folder):
    return [
        dataclasses.replace(one, config=one.config.model_copy(update={"output": folder})) for one in nodes
    ]


def test_runs_wait_for_what_they_need_and_failures_stop_only_dependants(make_config, tmp_path):
    teacher = node(make_config(name="teacher", seed=7))
    broken = node(make_config(name="broken", optim={"lr": 1e30, "clip": 1e30, "warmup": 0.0}))
    student, orphan = taught(make_config, teacher, 0.5), taught(make_config, broken, 0.5)
    progress = Recorded()
    nodes = [broken, teacher, orphan, student]
    with pytest.raises(UserError, match="2 of 4 runs failed") as caught:
        run(nodes, tmp_path, progress)
    assert "lower optim.lr" in str(caught.value)
    assert f"needs {broken.id}" in str(caught.value)
    assert status(teacher) == status(student) == "done"
    assert status(broken) == "failed"
    assert progress.most == 2
    failures = Failures(tmp_path, 1)
    attempts = json.loads((tmp_path / "queue" / "failures" / f"{broken.id}.json").read_text())["attempts"]
    assert len(attempts) == 2
    assert all("lower optim.lr" in one["error"] for one in attempts)
    with pytest.raises(UserError, match="2 of 4"):  # the mark stays
        run(nodes, tmp_path)
    assert failures.clear(broken.id)
    with pytest.raises(UserError, match="2 of 4"):  # tried again, and broken again
        run(nodes, tmp_path, retries=0)
    assert len(failures.attempted()) == 1


def test_runs_that_failed_by_a_damaged_teacher_go_on_by_the_same_command_once_it_is_mended(tmp_path):
    study, failures = tiny_study(), tmp_path / "queue" / "failures"
    run_tiny(study, tmp_path)
    (student,) = (tmp_path / "runs").glob("*-alpha-*")
    (teacher,) = (tmp_path / "runs").glob("teacher-*")
    whole = (student / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(student)
    weights_of_teacher = teacher / "model" / "model.safetensors"
    kept = weights_of_teacher.read_bytes()
    weights_of_teacher.write_bytes(kept[:-4] + b"ruin")
    for _ in range(2):  # one more attempt each time, and no more are kept than decide
        with pytest.raises(UserError, match=r"1 of 3 runs failed[\s\S]*model\.safetensors.*\n.*same command"):
            run_tiny(study, tmp_path)
        assert len(json.loads((failures / f"{student.name}.json").read_text())["attempts"]) == 2
    weights_of_teacher.write_bytes(kept)
    with Leases(tmp_path) as other:
        assert other.acquire("a run of another seed", "recipe")
        with pytest.raises(UserError, match="1 of 3 runs failed"):  # the mark is for those at work, too
            run_tiny(study, tmp_path)
    assert not (student / "state.json").exists()
    run_tiny(study, tmp_path)
    assert (student / "model" / "model.safetensors").read_bytes() == whole


def test_a_given_teacher_that_is_replaced_after_the_plan_makes_its_student_another_run(make_config, tmp_path):
    """The planned one was called done, and was not there."""
    small, other = (node(make_config(name="teacher", seed=seed)) for seed in (7, 8))
    run([small, other], tmp_path)
    given = tmp_path / "given"
    # Of a time of their own, by which a file that was replaced is known: the two were trained side by side.
    copy = partial(shutil.copytree, dst=given, copy_function=shutil.copy)
    copy(small.config.output / small.id / "model")
    taught_by = {"teacher": {"kind": "model", "path": str(given)}, "objective": {"alpha": 0.5}}
    planned = node(make_config(name="student", **taught_by), kind="student")
    shutil.rmtree(given)
    copy(other.config.output / other.id / "model")
    with pytest.raises(
        UserError, match=r"1 of 1 runs failed\n.*changed since the study was planned.*\n.*same"
    ):
        run([planned], tmp_path)
    again = node(make_config(name="student", **taught_by), kind="student")
    run([again], tmp_path)
    assert again.id != planned.id
    assert status(again) == "done"


class Instant:
    """An engine that writes down which run it was given, and says at once that it is done."""

    slots = largest = 1

    def __init__(self, status="done", text=""):
        self.started = []
        self.outcome = TaskOutcome(status=status, text=text)

    def free_memory(self):
        return math.inf

    def start(self, key, task):
        self.key = key
        self.started.append(task.configs[0].name)

    def wait(self, seconds):
        return {self.key: self.outcome}


@pytest.mark.parametrize(("status", "error"), [("disk", DiskError), ("lost", UserError)])
def test_a_full_disk_or_a_lost_cluster_ends_the_study_and_is_no_failure_of_a_run(
    make_config, tmp_path, status, error
):
    nodes = [node(make_config(name="a")), node(make_config(name="b", seed=7))]
    failures = Failures(tmp_path, 0)
    engine = Instant(status, "no more")
    with Leases(tmp_path, 0.2) as leases, pytest.raises(error, match=r"^no more$"):
        run_all(nodes, engine, leases, failures, Recorded())
    assert len(engine.started) == 1
    assert (failures.attempted(), failures.marked()) == (set(), {})


def test_a_writer_of_a_cache_that_gets_further_before_each_kill_has_not_failed(make_config, tmp_path):
    class Killed(Instant):
        """A worker that is killed, the first three times after it has finished one more shard."""

        def wait(self, seconds):
            if len(self.started) <= 3:
                (shards / f"{len(self.started):06d}.bin").touch()
            return super().wait(seconds)

    kept = {"kind": "run", "run": "teacher-0123abcd", "cache": {"format": {"kind": "topk", "k": 8}}}
    config = make_config(teacher=kept, objective={"alpha": 0.5})
    one = dataclasses.replace(node(config), cache=("key", 1.0))
    shards = one.config.output.parent / "caches" / "one" / "shards"
    shards.mkdir(parents=True)
    engine, failures = Killed("failed", "killed"), Failures(tmp_path, retries=1)
    with Leases(tmp_path, 0.2) as leases, pytest.raises(UserError, match="1 of 1 runs failed"):
        run_all([one], engine, leases, failures, Recorded())
    assert len(engine.started) == 4
    assert failures.marked() == {one.id: "killed"}


def test_one_replicate_is_run_before_the_next_and_the_longest_chain_of_each_first(make_config, tmp_path):
    nodes = []
    for seed, place in ((44, 1), (43, 0)):
        teacher = node(make_config(name=f"teacher-{place}", seed=seed))
        others = [
            node(make_config(name=f"alone-{place}", seed=seed)),
            taught(make_config, teacher, seed / 100),
        ]
        nodes += [dataclasses.replace(one, replicate=place) for one in (*others[:1], teacher, *others[1:])]
    engine = Instant()
    with Leases(tmp_path, 0.2) as leases:
        run_all(nodes, engine, leases, Failures(tmp_path, 1), Recorded())
    assert engine.started == ["teacher-0", "alone-0", "alpha-0.43", "teacher-1", "alone-1", "alpha-0.44"]


@pytest.mark.slow
def test_number_of_workers_and_cohorts_do_not_change_results(make_config, tmp_path):
    teacher = node(make_config(name="teacher", seed=7))
    first = [teacher, *(taught(make_config, teacher, alpha) for alpha in (0.2, 0.5, 0.8))]
    second, third = elsewhere(first, tmp_path / "b" / "runs"), elsewhere(first, tmp_path / "c" / "runs")
    run(first, tmp_path, workers=2)
    run(second, tmp_path / "b", workers=1)
    run(third, tmp_path / "c", workers=1, cohort=3)
    for a, b, c in zip(first, second, third, strict=True):
        assert a.id == b.id == c.id
        assert weights(a) == weights(b) == weights(c)
    state = json.loads((third[1].config.output / third[1].id / "state.json").read_text())
    assert state["cohort"] == 3


def test_what_is_finished_is_not_started_again(make_config, tmp_path):
    nodes = [node(make_config(seed=seed)) for seed in (1, 2)]
    run(nodes, tmp_path)
    before = sorted((tmp_path / "queue" / "leases").iterdir())
    run(nodes, tmp_path)
    assert sorted((tmp_path / "queue" / "leases").iterdir()) == before
    assert len(before) == 2


def test_stop_checkpoints_and_the_same_call_goes_on(make_config, tmp_path):
    nodes = [node(make_config(seed=seed, tokens=256 * 4000)) for seed in (1, 2)]
    with LocalEngine(2, []) as engine, Leases(tmp_path, 0.2) as leases:

        class Impatient(Recorded):
            def advance(self, stage, done):
                if all((one.config.output / one.id / "checkpoints").exists() for one in nodes):
                    ask_to_stop(tmp_path, leases.token)

        with pytest.raises(Stopped):
            run_all(nodes, engine, leases, Failures(tmp_path, 1), Impatient())
    assert {status(one) for one in nodes} == {"stopped"}
    assert Failures(tmp_path, 1).attempted() == set()
    with Leases(tmp_path, 0.2) as leases:
        leases.refresh()
        assert all(leases.acquire(one.id, "recipe") for one in nodes)


def test_workers_share_the_cores(make_config, tmp_path):
    """One that is forked after torch was loaded has the threads of all cores, and its own cores alone."""
    one = node(make_config(runtime={"device": "cpu"}))
    run([one], tmp_path, workers=cores())
    made = json.loads((one.config.output / one.id / "provenance.json").read_text())
    assert made["threads"] == 1


def test_two_runners_share_the_work(make_config, tmp_path):
    nodes = [node(make_config(seed=seed, tokens=256 * 40)) for seed in range(4)]
    shown = [Recorded(), Recorded()]
    threads = [
        threading.Thread(target=run, args=(nodes, tmp_path, progress), kwargs={"workers": 1})
        for progress in shown
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert {status(one) for one in nodes} == {"done"}
    assert all(progress.done == len(nodes) for progress in shown)
    leases = [json.loads(path.read_text()) for path in (tmp_path / "queue" / "leases").iterdir()]
    assert len(leases) == len(nodes)  # each was begun once
    assert len({lease["owner"] for lease in leases}) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked from a server on Linux alone")
@pytest.mark.parametrize(("kills", "text"), [(1, "nothing"), (2, "its process could not be started")])
def test_a_fork_server_that_is_killed_as_a_task_starts_is_replaced_once(tmp_path, monkeypatch, kills, text):
    ensure, left = forkserver.ensure_running, [None] * kills

    def ensure_and_kill():
        ensure()
        if left:
            left.pop()
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            os.waitid(os.P_PID, forkserver._forkserver._forkserver_pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(forkserver._forkserver, "ensure_running", ensure_and_kill)
    broken = StoreConfig(name="none", sources=({"kind": "corpus", "name": "nothing"},))
    with LocalEngine(1, []) as engine:
        monkeypatch.setattr(forkserver._forkserver, "_preload_modules", [])  # no torch: nothing is trained
        engine.start("store", StoreTask(config=broken, directory=tmp_path))
        while not (ended := engine.wait(0.5)):
            pass
    assert ended["store"].status == "failed"
    assert text in ended["store"].text
    assert left == []
    left.append(None)
    ensure_and_kill()  # the next test's workers are forked from a server with torch again


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked from a server on Linux alone")
@pytest.mark.parametrize(("length", "forked"), [(75, True), (76, False)])
def test_workers_start_under_a_long_temporary_directory(tmp_path, length, forked):
    """A path of 107 bytes is the longest for a socket: `man 7 unix`; job systems give longer ones."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        long = Path(name, "x" * (length - len(name) - 1))
        long.mkdir()
        script = """
import sys
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from tutelage.config.data_config import StoreConfig
from tutelage.study.engines import StoreTask
from tutelage.study.engines.local import LocalEngine

if __name__ == "__main__":
    broken = StoreConfig(name="none", sources=({"kind": "corpus", "name": "nothing"},))
    with LocalEngine(1, []) as engine:
        engine.start("store", StoreTask(config=broken, directory=Path(sys.argv[1])))
        while not (ended := engine.wait(0.5)):
            pass
    print(forkserver._forkserver._forkserver_pid is not None, ended["store"].text)
"""
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run(
            [sys.executable, "script.py", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"TMPDIR": str(long)},
        )
    assert done.stdout.startswith(f"{forked} "), done.stdout + done.stderr
    assert "nothing" in done.stdout


def say_what_is_collected(connection):
    """Send how many objects are never collected, and the MB that looking for garbage among the rest takes."""
    frozen, before = gc.get_freeze_count(), own_megabytes()
    gc.collect()
    connection.send((frozen, own_megabytes() - before))


def own_megabytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_what_a_worker_is_forked_with_stays_shared():
    """Objects are counted in themselves: a collection would copy the memory of all that were loaded."""
    context = local.LocalEngine(1, [])._context
    ours, theirs = context.Pipe()
    worker = context.Process(target=say_what_is_collected, args=(theirs,))
    worker.start()
    frozen, megabytes = ours.recv()
    worker.join()
    assert frozen > 100_000  # torch and transformers
    assert megabytes < 20


def test_a_finished_run_that_has_vanished_is_trained_again(make_config, tmp_path):
    teacher = node(make_config(name="teacher", seed=7))
    student = taught(make_config, teacher, 0.5)
    run([teacher, student], tmp_path)
    before = weights(teacher), weights(student)
    shutil.rmtree(teacher.directory.path)
    (tmp_path / "queue" / "leases" / "notes.txt").write_text("a file of somebody's")
    (tmp_path / "queue" / "leases" / "x.json").write_text("")
    run([teacher, student], tmp_path)
    assert (weights(teacher), weights(student)) == before


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked from a server on Linux alone")
def test_ctrl_c_while_the_fork_server_loads_is_no_traceback():
    """Sent again and again, from its start until a worker has worked."""
    script = """
import os, signal, threading, time
from functools import partial
from multiprocessing import forkserver, get_context
from tutelage.study.engines import local

def send():
    while not done.wait(0.05):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)

if __name__ == "__main__":
    local.LocalEngine(1, [])
    local._start_fork_server()
    done = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    worker = get_context("forkserver").Process(target=time.sleep, args=(0.1,))
    worker.start()
    worker.join()
    done.set()
    thread.join()
    print(worker.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
