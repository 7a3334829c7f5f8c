"""A study on a real Ray cluster of two nodes on this machine, one of its runs in two processes.

The others' files are those of the local engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import assert_same_weights, rows

from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id

ON_RAY = """
import json, os, signal, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from tutelage.config.run_config import RunConfig
from tutelage.config.data_config import StoreConfig
from tutelage.errors import Stopped, UserError
from tutelage.run_directory import run_id
from tutelage.study.cells import Cell
from tutelage.study.leases import Leases, ask_to_stop
from tutelage.progress import NullProgress
from tutelage.study.engines import StoreTask
from tutelage.study.engines.ray import RayEngine
from tutelage.study.leases import Failures
from tutelage.study.nodes import Cost, Node
from tutelage.study.runner import run_all

folder, text = Path(sys.argv[1]), sys.argv[2]
nodes = []
for config in map(RunConfig.model_validate_json, json.loads(text)):
    needs = (config.teacher.run,) if config.teacher and config.teacher.kind == "run" else ()
    labels = {"group": "test", "student": "tiny", "teacher": None}
    size = {"seed": config.seed, "shape": "nano-50k", "tokens": 1, "settings": {}}
    cell = Cell(name=config.name, kind="baseline", **labels, **size)
    nodes.append(Node(run_id(config), cell, config, needs, Cost(1, 1, 1.0, 0.0)))

class Stopper(NullProgress):
    most = 0
    stopping = True
    runs, running = set(), set()
    def start(self, stage, total=None, unit="", done=0):
        if total == 1.0:  # the stage of all runs has their work as its total
            self.runs.add(stage)
    def describe(self, stage, figures):
        if stage in self.runs and "elsewhere" not in figures.get("where", ""):
            self.running.add(stage)
        self.most = max(self.most, len(self.running))
    def finish(self, stage, outcome="done"):
        self.running.discard(stage)
    killed = False
    def kill_rank_1(self):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\\0")
                words = (path / "cmdline").read_bytes().split(b"\\0")
            except OSError:
                continue
            ours = {b"RANK=1", b"TUTELAGE_TEST=" + os.environb[b"TUTELAGE_TEST"]}  # no other test's
            if ours.issubset(variables) and b"tutelage.study.engines.tasks" in words and not self.killed:
                os.kill(int(path.name), signal.SIGKILL)
                self.killed = True
    def advance(self, stage, done):
        if not self.stopping:
            self.kill_rank_1()
        begun = [node for node in nodes if (node.config.output / node.id / "checkpoints").exists()]
        if self.stopping and begun:
            ask_to_stop(folder, self.token)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
progress = Stopper()
for attempt in range(2):
    with RayEngine(cluster.address, None, "cpu") as engine, Leases(folder, 0.5) as leases:
        assert engine.slots == 2
        if attempt == 0:
            broken = StoreConfig(name="none", sources=({"kind": "corpus", "name": "nothing"},))
            engine.start("store", StoreTask(config=broken, directory=folder))
            while not (ended := engine.wait(0.5)):
                pass
            assert ended["store"].status == "failed" and "nothing" in ended["store"].text
        progress.token, progress.stopping = leases.token, attempt == 0
        try:
            run_all(nodes, engine, leases, Failures(folder, 1), progress)
        except Stopped:
            assert attempt == 0
            states = [json.loads(path.read_text())["status"] for path in folder.glob("runs/*/state.json")]
            print("stopped", sorted(states), flush=True)
cluster.shutdown()
print("most", progress.most)
for path in folder.glob("queue/failures/*.json"):
    print(*(one["error"] for one in json.loads(path.read_text())["attempts"]), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes_share_a_study_stop_and_go_on(make_config, tmp_path):
    pytest.importorskip("ray")
    seldom = {"checkpoint": {"every": 40 * 256}}  # every four steps, they take as long as those
    teacher = make_config(name="teacher", seed=7, tokens=256 * 400, parallel={"processes": 2}, **seldom)
    taught_by = [{"kind": "run", "run": run_id(teacher)}, {"kind": "unigram"}]
    configs = [teacher] + [
        make_config(name=teacher["kind"], teacher=teacher, objective={"alpha": 0.5}, tokens=256 * 40)
        for teacher in taught_by  # the runs of a study differ in name
    ]
    there = [config.model_copy(update={"output": tmp_path / "ray" / "runs"}) for config in configs]
    text = json.dumps([config.model_dump_json() for config in there])
    killed = tmp_path / "ray" / "queue" / "ray" / run_id(teacher) / "left-by-a-killed-attempt"
    killed.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, str(tmp_path / "ray"), text],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"RAY_worker_niceness": "0", "TUTELAGE_TEST": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped ['stopped']" in done.stdout
    assert "most 2" in done.stdout  # with one core per node, on both
    assert not list((tmp_path / "ray" / "queue" / "ray").iterdir())
    assert "\nrank 1: its process ended by signal SIGKILL (out of memory?)\n" in done.stdout
    ours, theirs = [], []
    for config, other in zip(configs, there, strict=True):
        run(config)
        for directories, one in ((ours, config), (theirs, other)):
            directories.append(RunDirectory(one.output / run_id(config)))
    alone, two = (
        [row["loss"] for row in rows(directories[0])[:40]] for directories in (ours, theirs)
    )  # later, rounding has grown
    assert two == pytest.approx(alone, rel=1e-4)
    assert len(rows(theirs[0])) == 400  # stopped, killed and resumed, each step is there once
    assert_same_weights(ours[2], theirs[2])
    commands = [json.loads((one.path / "provenance.json").read_text())["command"] for one in theirs]
    assert commands == [["-c", str(tmp_path / "ray"), text]] * 3  # not Ray's own


LOST = """
import os, signal, sys
from pathlib import Path
from tutelage.config.data_config import StoreConfig
from tutelage.study.engines import StoreTask
from tutelage.study.engines.ray import RayEngine

nothing = StoreConfig(name="none", sources=({"kind": "corpus", "name": "nothing"},))
with RayEngine("local", 1, "cpu") as engine:
    ours = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (raylet,) = [child for child in ours if b"/raylet\\0" in Path("/proc", child, "cmdline").read_bytes()]
    os.kill(int(raylet), signal.SIGKILL)
    engine.start("store", StoreTask(config=nothing, directory=Path(".")))
    while not (ended := engine.wait(0.5)):
        pass
print(ended["store"].status, ended["store"].text)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_lost_cluster_is_no_fault_of_a_task():
    """Every run of a study failed, one after the other, each twice."""
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=True)
    assert "\nlost the Ray cluster has ended (The task's local raylet died" in "\n" + done.stdout
