from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys

import pytest
from rich.console import Console
from tiny_study import tiny_study

from tutelage.cli.bars import RichProgress, err, out
from tutelage.cli.study_output import print_status
from tutelage.config.teacher_config import ControlTeacher, TeachConfig
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models.flops import forward_flops
from tutelage.models.shapes import find_shape
from tutelage.progress import NullProgress
from tutelage.records import read_sealed, write_manifest_file, write_sealed
from tutelage.run_directory import RunDirectory
from tutelage.study import nodes as study_nodes
from tutelage.study.cost import Machine, forecast
from tutelage.study.expand import expand
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import Stores, bind
from tutelage.study.plan import plan_of, save_plan
from tutelage.study.presets import demo_study
from tutelage.study.reporter import StudyProgress, StudyReporter
from tutelage.study.status import read_status, retry_runs, stop_study
from tutelage.teachers.cache.job import load_job, plan_cache

STUDY = demo_study(1, "20K", quick=False)


@pytest.fixture
def nodes(store, other_store, tmp_path):
    """Two runs done, one stopped, one that goes on, one given up, one to be tried again, the rest waiting."""
    stores = Stores(store, dict.fromkeys(STUDY.domains, other_store), {}, {})
    found = bind(expand(STUDY), stores, tmp_path / "runs", 300)
    save_plan(tmp_path, plan_of(expand(STUDY), found))
    for node, status, speed in zip(
        found[:4], ("done", "done", "stopped", "running"), (1e9, 2e9, 1e9, 1e9), strict=True
    ):
        directory = RunDirectory(tmp_path / "runs" / node.id)
        directory.path.mkdir(parents=True)
        seconds = (node.cost.total) / speed
        directory.write_state(status, seconds=seconds, step=5, steps=10)
        if status == "done":
            directory.model.mkdir()
            (directory.model / "config.json").touch()
        directory.append_metrics({"step": 5, "tokens": 10_000, "loss": 3.25, "tokens_per_second": 500.0})
    failures = Failures(tmp_path, 1)
    failures.add(found[4].id, "too hot", 0)
    failures.add(found[4].id, "too hot again", 0)
    failures.add(found[5].id, "unlucky", 0)
    return found


def test_states_are_told_apart_and_estimates_held_against_what_runs_took(nodes, tmp_path):
    with Leases(tmp_path) as leases:
        leases.acquire(nodes[3].id, "recipe")
        status = read_status(tmp_path)
        with out.capture() as shown:
            print_status(status, tmp_path)
    rest = len(nodes) - 5
    assert status.counts == {"done": 2, "stopped": 1, "running": 1, "failed": 1, "waiting": rest}
    assert status.failed == {nodes[4].id: "too hot again"}
    assert status.retried == [nodes[5].id]
    assert [one.run for one in status.active] == [nodes[3].id]
    assert status.error == pytest.approx(0.75)  # each by the other's speed: |2 - 1| and |1/2 - 1|
    flops = sum(node.cost.total for node in nodes[4:]) + sum(node.cost.total / 2 for node in nodes[2:4])
    assert flops / 2e9 <= status.seconds_left <= flops / 1e9
    text = shown.get()
    for part in ("2 done", "3.250", "too hot again", "heartbeat", "75%", "study retry"):
        assert part in text
    assert read_status(tmp_path).counts["stopped"] == 2  # nobody is at it any more
    with out.capture() as shown:
        print_status(read_status(tmp_path), tmp_path)
    assert "study run` with the same file tries it again" in " ".join(shown.get().split())
    assert read_status(tmp_path).runners == []


def test_what_is_next_depends_on_who_is_at_work_not_on_what_is_held(nodes, tmp_path):
    Failures(tmp_path, 1).clear(nodes[4].id)

    def following():
        with out.capture() as shown:
            print_status(read_status(tmp_path), tmp_path)
        return " ".join(shown.get().split())

    with Leases(tmp_path) as leases:
        assert "study stop" in following()  # between two runs
        leases.acquire(nodes[3].id, "recipe")
        assert "study stop" in following()
        record = tmp_path / "queue" / "runners" / f"{leases.token}.json"
        write_sealed(record, read_sealed(record) | {"machine": "another", "time": 0.0})
        assert "silent" in following()
        assert "study stop" not in following()  # nobody would answer
        assert "`tutelage study run` with the same file resumes" in following()


def test_a_dead_runner_is_listed_until_its_runs_are_taken_over(nodes, tmp_path):
    with Leases(tmp_path, beat_seconds=600) as dead, Leases(tmp_path) as heir:
        record = tmp_path / "queue" / "runners" / f"{dead.token}.json"
        dead.acquire(nodes[3].id, "recipe")
        with subprocess.Popen([sys.executable, "-c", ""]) as gone:
            gone.wait()
        write_sealed(record, read_sealed(record) | {"pid": gone.pid})
        listed = read_status(tmp_path).runners
        assert f"{socket.gethostname()} process {gone.pid}: dead" in listed
        assert len(listed) == 2
        heir.refresh()
        assert heir.acquire(nodes[3].id, "recipe")
        assert [line.partition(": ")[2][:9] for line in read_status(tmp_path).runners] == ["heartbeat"]


def test_runs_that_an_edited_study_has_dropped_are_named(nodes, tmp_path):
    assert read_status(tmp_path).not_planned == []
    for name in ("student-dropped-2", "student-dropped-1", "no-run"):
        (tmp_path / "runs" / name).mkdir()
    for name in ("student-dropped-2", "student-dropped-1"):
        RunDirectory(tmp_path / "runs" / name).write_state("stopped")
    status = read_status(tmp_path)
    assert status.not_planned == ["student-dropped-1", "student-dropped-2"]
    with out.capture() as shown:
        print_status(status, tmp_path)
    assert "student-dropped-1 and 1 more: there, but not in this plan" in " ".join(shown.get().split())


def test_what_a_run_has_done_is_not_left(nodes, tmp_path):
    """Of a run that had taken 99% of its steps, all of its time was said to be left."""
    before = read_status(tmp_path).seconds_left
    nodes[2].directory.write_state("stopped", step=10, steps=10)
    nodes[3].directory.write_state("running", step=10, steps=10)
    after = read_status(tmp_path).seconds_left
    halves = sum(node.cost.total / 2 for node in nodes[2:4])
    assert halves / 2e9 <= before - after <= halves / 1e9


def test_looking_changes_nothing(nodes, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert sum(read_status(tmp_path).counts.values()) == len(nodes)
    assert sorted(tmp_path.rglob("*")) == before


def test_stop_asks_and_says_who_is_still_there(nodes, tmp_path):
    with Leases(tmp_path) as leases:
        assert stop_study(tmp_path, 0.3) == (1, 1)
        assert leases.is_asked_to_stop()
    assert stop_study(tmp_path, 0.3) == (0, 0)


def test_stop_says_whom_it_asked_and_how_long_it_waits_before_it_waits(nodes, tmp_path):
    stop = [sys.executable, "-m", "tutelage", "study", "stop", str(tmp_path)]
    with Leases(tmp_path) as leases:
        process = subprocess.Popen(stop, stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline() for _ in range(2)]
        assert process.poll() is None
        assert leases.is_asked_to_stop()
    assert lines[0] == f"asked    {socket.gethostname()} process {os.getpid()} to stop\n"
    assert lines[1] == "waiting  up to 90 s for their checkpoints\n"
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.splitlines()[0]) == (0, "stopped  1 of 1 runner")


def test_retry_clears_what_is_named(nodes, tmp_path):
    with pytest.raises(UserError, match="no run nonsense"):
        retry_runs(tmp_path, ["nonsense"])
    assert retry_runs(tmp_path, [nodes[5].id]) == [nodes[5].id]
    assert retry_runs(tmp_path, []) == [nodes[4].id]
    assert read_status(tmp_path).failed == {}


def test_plan_goes_by_how_fast_finished_runs_were(nodes, tmp_path):
    found = forecast([expand(STUDY)], Machine("cpu", 1, None, None), tmp_path)
    assert "2 finished runs" in found["source"]
    total = sum(found["flops"].values())
    assert total / 2e9 <= found["time"]["wall_seconds"] <= total / 1e9


def test_without_a_terminal_each_end_is_said_once(nodes, tmp_path):
    ids = [node.id for node in nodes]
    with err.capture() as shown, RichProgress() as progress:
        reporter = StudyReporter(progress, nodes, 2)
        reporter.show(StudyProgress(nodes, {ids[3]}, set(), set(), {}))
        for finished in (set(ids[:1]), set(ids[:2]), set(ids[:2])):
            reporter.show(StudyProgress(nodes, {ids[3]}, set(), finished, {ids[4]: "too hot"}))
    lines = shown.get().splitlines()
    assert sum("done" in line for line in lines) == 2
    assert sum("failed" in line for line in lines) == 1
    assert nodes[0].cell.name in lines[0]


def test_scoring_takes_time_too(nodes, tmp_path, monkeypatch):
    """Scoring the finished run of the same shape took 60 s, so one that has been trained has those left."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=160, height=24, highlight=False)
    monkeypatch.setattr("tutelage.cli.bars.err", screen)
    for node in nodes[:2]:
        alike = node.cell.shape == nodes[3].cell.shape
        node.directory.write_state("done", scoring_seconds=60 if alike else 40)
    nodes[3].directory.write_state("running", seconds=5, step=10, steps=10)
    with RichProgress() as progress:
        StudyReporter(progress, nodes, 1).show(
            StudyProgress(nodes, {nodes[3].id}, set(), {nodes[0].id, nodes[1].id}, {})
        )
    last_drawn = screen.file.getvalue().splitlines()[::-1]
    own = next(line for line in last_drawn if nodes[3].cell.name in line)
    assert "60 s left  scoring" in own
    assert "100%" not in own
    whole = next(line for line in last_drawn if "11 runs" in line)
    assert float(re.search(r"([\d.]+) min left", whole)[1]) >= 9 * 50 / 60


def test_in_a_terminal_the_table_has_state_loss_speed_and_time_left(nodes, tmp_path, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=160, highlight=False)
    monkeypatch.setattr("tutelage.cli.bars.err", screen)
    with RichProgress() as progress:
        StudyReporter(progress, nodes, 2).show(
            StudyProgress(
                nodes, {nodes[3].id}, {nodes[2].id}, {nodes[0].id, nodes[1].id}, {nodes[4].id: "hot"}
            )
        )
    shown = screen.file.getvalue()
    last_drawn = shown.splitlines()[::-1]
    row = next(line for line in last_drawn if nodes[3].cell.name in line)
    for part in ("3.250", "500", "left"):
        assert part in row
    assert "elsewhere" in next(line for line in last_drawn if nodes[2].cell.name in line)
    assert "2 of 11 runs are finished already" in shown
    assert any("2 done · 1 failed" in line for line in last_drawn if "11 runs" in line)


class Left(NullProgress):
    """Remembers how many seconds a study was said to have left."""

    def describe(self, stage, figures):
        if stage.endswith(" runs"):
            self.seconds = figures["seconds_left"]


def test_a_cache_that_is_still_to_be_written_takes_time(store, other_store, tmp_path, monkeypatch):
    """The time left was that of the runs that read it, as if it were there."""
    taught_by = {"product": {"teacher": ["weak"], "alpha": [0.2, 0.4]}}
    study = tiny_study(
        teachers={"weak": {"shape": "nano-20k", "tokens": "4K", "cache": {}}},
        students={"main": {"shape": "nano-50k", "tokens": "4K", "grid": taught_by}},
    )
    stores = Stores(store, dict.fromkeys(study.domains, other_store), {}, {})
    opened = []
    monkeypatch.setattr(study_nodes, "open_store", lambda path: (opened.append(path), open_store(path))[1])
    nodes = bind(expand(study), stores, tmp_path / "runs", 300)
    assert opened == [store]  # once, for both students
    for node in nodes:
        node.directory.path.mkdir(parents=True)
        node.directory.write_state(
            "done", seconds=node.cost.total / 1e6, scoring_seconds=0.0, step=4, steps=4
        )
    taught = [node for node in nodes if node.config.teacher is not None]
    others = {node.id for node in nodes if node.config.teacher is None}
    tokens, length = open_store(store).manifest.splits["train"].tokens, taught[0].config.data.sequence_length
    writing = tokens * forward_flops(find_shape("nano-20k"), 300, length) / 1e6
    training = sum(node.cost.total for node in taught) / 1e6
    reporter = StudyReporter(told := Left(), nodes, 1)
    reporter.show(StudyProgress(nodes, set(), set(), others, {}))
    assert len(taught) == 2
    assert told.seconds == pytest.approx(training + writing)  # one cache for both
    first = taught[0]
    teach = TeachConfig(
        store=store,
        teacher=ControlTeacher(kind="uniform"),
        context_length=length,
        shard_tokens=32 * length,
        format={"kind": "sample_min_variance"},
        device="cpu",
        output=tmp_path / "caches",
    )
    job = load_job(plan_cache(teach))
    record = job.manifest.teacher.model_copy(update={"id": first.config.teacher.run})
    shards = job.manifest.layout.shards
    (job.plan.path / "shards").mkdir(parents=True)
    write_manifest_file(job.plan.path, job.manifest.model_copy(update={"teacher": record}))
    for shard in range(shards // 2):
        (job.plan.path / job.manifest.layout.file(shard)).touch()
    reporter.show(StudyProgress(nodes, set(), set(), others, {}))
    assert shards > 20
    assert told.seconds == pytest.approx(training + writing * (1 - (shards // 2) / shards), rel=0.02)
    first.directory.write_state("running", seconds=first.cost.total / 4e6, step=1, steps=4)
    reporter.show(StudyProgress(nodes, {first.id}, set(), others, {}))
    assert told.seconds == pytest.approx(training - first.cost.total / 4e6)
