"""Speed, memory and cost of a run: every figure recomputed from the row's others or by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from training import StopAt, rows

from tutelage.data.loader import Loader
from tutelage.errors import Stopped
from tutelage.models.flops import forward_flops
from tutelage.models.shapes import find_shape
from tutelage.run import run, run_cohort
from tutelage.teachers.live import OnlineTeacher
from tutelage.train import metrics, step
from tutelage.train.metrics import MEASURED, Meter, peak_flops
from tutelage.train.stopwatch import PARTS, Stopwatch

RUNTIME = {"device": "cpu", "threads": 1, "log_every": 3}
SPEED = {"tokens_per_second", "tokens_per_second_per_device", "mfu", "peak_memory_gib", "data_wait"}


@pytest.fixture
def teacher(make_config):
    return run(make_config(name="teacher", model={"shape": "nano-150k"}, tokens=512))


@pytest.fixture
def taught(make_config, teacher):
    def make(**changes):
        return make_config(
            **{"teacher": {"kind": "run", "run": teacher.id}, "objective": {"alpha": 0.5}, "runtime": RUNTIME}
            | changes
        )

    return make


def expected_mfu(row, directory, shape, store):
    """Operations of a student of this shape and its teacher of nano-150k, over what the machine can do."""
    vocab = json.loads((store / "manifest.json").read_text())["vocab_size"]
    student = 3 * forward_flops(find_shape(shape), vocab, 32)
    teacher = forward_flops(find_shape("nano-150k"), vocab, 32)
    speed = (student + teacher) * row["tokens_per_second"] / directory.state()["peak_flops"]
    return pytest.approx(speed, rel=1e-3, abs=1e-6)


def test_mfu_is_the_operations_of_student_and_teacher_over_the_peak(taught, store):
    directory = run(taught())
    state, found = directory.state(), rows(directory)
    assert [row["step"] for row in found] == [3, 4, 6, 8, 9, 12]
    for row in found:
        assert row["mfu"] == expected_mfu(row, directory, "nano-50k", store)
        assert row["tokens_per_second_per_device"] == row["tokens_per_second"]
        assert 0 < row["mfu"] < 1
        assert row["tokens_per_parameter"] == pytest.approx(row["tokens"] / state["parameters"], abs=1e-6)
    assert state["peak_source"] == "measured: products of 512 x 512 matrices in float32"


def test_cached_targets_cost_no_teacher(make_config, store, taught, teacher):
    cached = taught(
        teacher={"kind": "run", "run": teacher.id, "cache": {"format": {"kind": "topk", "k": 8}}},
    )
    directory = run(cached)
    vocab = json.loads((store / "manifest.json").read_text())["vocab_size"]
    student = 3 * forward_flops(find_shape("nano-50k"), vocab, 32)
    for row in rows(directory):
        expected = student * row["tokens_per_second"] / directory.state()["peak_flops"]
        assert row["mfu"] == pytest.approx(expected, rel=1e-3)


def test_speed_is_tokens_over_the_time_between_rows(taught):
    found = rows(run(taught()))
    for before, after in itertools.pairwise(found):
        seconds = after["seconds"] - before["seconds"]
        expected = (after["tokens"] - before["tokens"]) / seconds
        assert after["tokens_per_second"] == pytest.approx(expected, rel=0.2, abs=2 / seconds)


def test_the_parts_of_a_step_are_its_time(taught, monkeypatch):
    """A step is as long as its parts; the teacher, three times the student, takes a share worth the name."""
    took = []
    read = Stopwatch.seconds
    monkeypatch.setattr(Stopwatch, "seconds", lambda self, owner: took.append(read(self, owner)) or took[-1])
    found = rows(run(taught(runtime=RUNTIME | {"log_every": 1}, checkpoint={"every": "1M"})))
    assert len(took) == len(found) == 12
    for row, parts in zip(found, took, strict=True):
        assert set(parts) == set(PARTS)
        for part, seconds in parts.items():
            assert row[f"seconds_{part}"] == pytest.approx(seconds, abs=1e-6)
            assert seconds > 0
        whole = sum(parts.values())
        assert row["teacher_share"] == pytest.approx(parts["teacher"] / whole, abs=1e-5)
        assert whole < 256 / row["tokens_per_second"]
    assert sum(sum(parts.values()) for parts in took[2:]) > 0.3 * (found[-1]["seconds"] - found[1]["seconds"])


def test_only_logged_steps_are_measured(taught, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "tutelage.train.loop.Stopwatch",
        lambda device, running: measured.append(running) or Stopwatch(device, running=running),
    )
    run(taught())
    assert [step for step, on in enumerate(measured, 1) if on] == [3, 4, 6, 8, 9, 12]


def test_a_part_that_takes_longer_is_seen(taught, monkeypatch):
    """Sleep in one place of the step at a time, and look where the time went."""

    def slowed(function):
        return lambda *arguments: (time.sleep(0.15), function(*arguments))[1]

    places = {"teacher": (OnlineTeacher, "targets"), "optimizer": (step, "update")}
    for number, (part, (owner, name)) in enumerate(places.items()):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slowed(getattr(owner, name)))
            found = rows(run(taught(seed=number, tokens=4 * 256, runtime=RUNTIME | {"log_every": 1})))
        took = {name: statistics.median(row[f"seconds_{name}"] for row in found) for name in PARTS}
        assert took.pop(part) > 0.15
        assert max(took.values()) < 0.15


def test_waiting_for_data_is_a_share_of_the_time(taught, monkeypatch):
    """Batches that take 0.3 s each, while a step takes less, cost what is left of that."""
    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, step: (time.sleep(0.3), batch(self, step))[1])
    found = rows(run(taught(tokens=6 * 256, runtime=RUNTIME | {"log_every": 1})))
    assert 0.2 < statistics.median(row["data_wait"] for row in found) < 1
    for row in found:
        computed = sum(row[f"seconds_{part}"] for part in PARTS)
        per_step = 256 / row["tokens_per_second"]
        assert row["data_wait"] * per_step + computed < 1.01 * per_step


def test_memory_is_the_high_water_mark_of_the_process(taught):
    before = metrics.peak_memory(torch.device("cpu"))
    ballast = torch.ones(64 * 2**20)  # 256 MiB
    found = rows(run(taught()))
    assert found[0]["peak_memory_gib"] >= round(before / 2**30, 6)  # as rows are rounded
    assert found[-1]["peak_memory_gib"] * 2**30 > ballast.nbytes
    assert all(a["peak_memory_gib"] <= b["peak_memory_gib"] for a, b in itertools.pairwise(found))


def test_a_resumed_run_counts_on(taught):
    config = taught()
    with pytest.raises(Stopped):
        run(config, StopAt(5))
    found = rows(run(config))
    assert [row["step"] for row in found] == [3, 4, 6, 8, 9, 12]
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds)
    speeds = [row[name] for row in found for name in ("mfu", "tokens_per_second")]
    assert all(math.isfinite(speed) and speed > 0 for speed in speeds)


def test_a_run_in_a_cohort_has_its_own_parts_and_the_shared_teacher(taught, store):
    shapes = ("nano-50k", "nano-350k")
    directories = run_cohort([taught(name=shape, model={"shape": shape}) for shape in shapes])
    small, large = (rows(directory) for directory in directories)
    for ours, theirs in zip(small, large, strict=True):
        assert ours["seconds_teacher"] == theirs["seconds_teacher"]
    for found, directory, shape in zip((small, large), directories, shapes, strict=True):
        for row in found:
            assert row["mfu"] == expected_mfu(row, directory, shape, store)
    # The least, for a load that passes makes a step of a few milliseconds many times longer.
    backward = [min(row["seconds_backward"] for row in found) for found in (small, large)]
    assert backward[0] < backward[1]


def test_what_depends_on_the_machine_is_listed(taught):
    first, again = (rows(run(taught(seed=seed))) for seed in (5, 5))
    assert first == again  # it is the same finished run
    assert set(first[0]) >= MEASURED
    assert SPEED < MEASURED


class _Remote:
    """What `wandb.init` gives back."""

    logged: list[dict[str, float]] = []  # noqa: RUF012 - shared on purpose
    resumed = False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.logged.append(row)

    def finish(self):
        """Nothing to flush."""


class _Events:
    """Where TensorBoard's writer stands."""

    written: list[tuple[str, float, int]] = []  # noqa: RUF012 - the same

    def __init__(self, directory, purge_step):
        assert directory.endswith("tensorboard")
        assert purge_step == 1

    def add_text(self, name, text):
        assert name == "config"
        assert "log_every" in text

    def flush(self):
        """Nothing to flush."""

    def add_scalar(self, name, value, step, walltime):
        assert abs(time.time() - walltime) < 60
        self.written.append((name, value, step))

    def close(self):
        """Nothing to flush."""


def test_trackers_get_the_new_fields(taught, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: _Remote()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=_Events))
    found = rows(run(taught(runtime=RUNTIME | {"trackers": ["tensorboard", "wandb"]})))
    for row in found:
        del row["crc32"]
    assert _Remote.logged == found
    assert {*SPEED, "teacher_share", "seconds_objective", "skipped_steps"} < set(found[0])
    assert _Events.written == [
        (f"train/{name}", value, row["step"])
        for row in found
        for name, value in row.items()
        if name != "step"
    ]


def test_the_peak_of_a_known_card_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda", 5), torch.bfloat16)[0] == 989e12


class _World:
    device, size = torch.device("cpu"), 4


def test_several_devices_share_the_peak(monkeypatch):
    """Four ranks: speed is of all, MFU of all devices, waits and memory of the worst."""
    worst = torch.tensor([[0.1, 0.2, 1.0], [0.3, 0.1, 2.0], [0.1, 0.4, 1.5], [0.1, 0.1, 1.0]])
    worst[:, 2] *= 2**30
    monkeypatch.setattr("tutelage.train.distributed.gather", lambda _: worst)
    meter = Meter(_World, 1000, torch.float32)
    meter.start(10, 0, 5.0)
    time.sleep(0.05)
    row = meter.measure(14, 2000, (10.0, 4.0), {})
    speed = row["tokens_per_second"]
    assert row["tokens_per_second_per_device"] == pytest.approx(speed / 4, rel=1e-3)
    assert row["mfu"] == pytest.approx(speed * (10 + 4 * 2000 / 4000) / (4 * meter.peak), abs=1e-6)
    assert (row["data_wait"], row["peak_memory_gib"]) == (pytest.approx(0.4), pytest.approx(2.0))
    assert meter.own_seconds == pytest.approx([0.1, 0.3, 0.1, 0.1])
    assert row["seconds"] >= 5.0


def test_the_clock_of_a_gpu_is_read_from_its_events(monkeypatch):
    """A stand-in for the device's queue: events have times, and are waited for before they are read."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            type(self).now += 0.25
            self.at, self.reached = self.now, False

        def synchronize(self):
            self.reached = True

        def elapsed_time(self, end):
            assert end.reached
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"), running=True)
    for part, owner in (("start", None), ("teacher", None), ("forward", 0), ("forward", 1), ("backward", 0)):
        watch.lap(part, owner)
    assert watch.seconds(0) == {"teacher": 0.25, "forward": 0.25, "backward": 0.25}
    assert watch.seconds(1) == {"teacher": 0.25, "forward": 0.25}
