from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from training import Notes, StopAt

from tutelage.errors import Stopped, UserError
from tutelage.evals import evaluate
from tutelage.evals.score_files import read_scores
from tutelage.run import run, run_cohort
from tutelage.train import trackers


class Memory:
    """A tracker that keeps its rows."""

    rows: list[dict[str, float]] = []  # noqa: RUF012 - shared on purpose: the run makes its own instance
    closed = 0

    def __init__(self, directory, config, step, past):
        assert config["name"] == "tiny"
        assert directory.name.startswith("tiny-")

    def log(self, row):
        self.rows.append(dict(row))

    def close(self):
        type(self).closed += 1


class Catching(Memory):
    """One that takes past rows too."""

    rows: list[dict[str, float]] = []  # noqa: RUF012 - the same

    def __init__(self, directory, config, step, past):
        self.rows += past


def test_trackers_get_every_row_and_are_closed(make_config, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Memory)
    run(make_config(runtime={"device": "cpu", "threads": 1, "log_every": 3, "trackers": ["trackio"]}))
    assert [row["step"] for row in Memory.rows] == [3, 4, 6, 8, 9, 12]  # log steps and checkpoints
    assert Memory.closed == 1


def test_what_a_kill_took_along_is_sent_again_and_scores_are_sent(make_config, store, monkeypatch):
    """A tracker that forgets what it was sent before the stop has everything in the end."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Catching)
    runtime = {"device": "cpu", "threads": 1, "log_every": 1, "trackers": ["wandb"]}
    domains = [{"name": "own", "store": str(store), "role": "in_domain"}]
    scored = {"domains": domains, "every": 4 * 256, "max_documents": 2, "max_tokens": 64}
    config = make_config(runtime=runtime, eval=scored)
    with pytest.raises(Stopped):
        run(config, StopAt(6))
    Catching.rows.clear()
    directory = run(config)
    steps = [row["step"] for row in Catching.rows if "loss" in row]
    assert sorted(set(steps)) == [*range(1, 13)]
    found = {row["step"]: row for row in Catching.rows if "eval/own/test/bits_per_byte" in row}
    assert {step: row["eval/own/test/bits_per_byte"] for step, row in found.items()} == {
        score.step: score.value
        for score in read_scores(directory.scores)
        if (score.metric, score.split) == ("bits_per_byte", "test")
    }
    assert [*found] == [4, 8, 12]


def test_scores_of_a_stopped_session_are_sent(make_config, store, monkeypatch):
    """Domains that were scored before a stop, and those that the next session scores."""

    saving, saved = evaluate.save_scores, []

    def save_and_stop(*args):
        saving(*args)
        saved.append(args)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Catching)
    Catching.rows.clear()
    monkeypatch.setattr(evaluate, "save_scores", save_and_stop)
    domains = [{"name": name, "store": str(store)} for name in ("first", "second")]
    scored = {"domains": domains, "max_documents": 2, "max_tokens": 64}
    config = make_config(runtime={"device": "cpu", "threads": 1, "trackers": ["wandb"]}, eval=scored)
    with pytest.raises(Stopped):
        run(config)
    assert not [row for row in Catching.rows if "loss" not in row]
    run(config)
    (row,) = [row for row in Catching.rows if "eval/first/test/bits_per_byte" in row]
    assert "eval/second/test/bits_per_byte" in row


class Failing(Memory):
    """A tracker whose disk is full from a step on, as TensorBoard's is."""

    rows: list[dict[str, float]] = []  # noqa: RUF012 - the same
    fails_at = 6

    def log(self, row):
        if row["step"] >= self.fails_at:
            raise OSError(28, "No space left on device")
        super().log(row)

    def close(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails_at", [6, 100])
def test_a_tracker_that_fails_is_left_out(make_config, monkeypatch, fails_at):
    """Training ends as it does without it, with one warning; other trackers get everything."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Memory)
    monkeypatch.setattr(Failing, "fails_at", fails_at)
    Failing.rows.clear()
    Memory.rows.clear()
    progress = Notes()
    runtime = {"device": "cpu", "threads": 1, "log_every": 3, "trackers": ["wandb", "trackio"]}
    directory = run(make_config(runtime=runtime), progress)
    assert directory.is_done()
    (warning,) = [note for note in progress.notes if "No space" in note]
    assert "wandb failed" in warning
    assert directory.id in warning
    assert [row["step"] for row in Failing.rows] == [step for step in (3, 4, 6, 8, 9, 12) if step < fails_at]
    assert [row["step"] for row in Memory.rows] == [3, 4, 6, 8, 9, 12]


def test_a_tracker_that_does_not_start_is_refused_before_the_first_step_only(make_config, monkeypatch):
    def without_key(directory, config, step, past):
        raise ValueError("No API key configured.\nUse `wandb login` to log in.")

    runtime = {"device": "cpu", "threads": 1, "log_every": 3}
    tracked = make_config(runtime=runtime | {"trackers": ["trackio", "wandb"]})
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Memory)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", without_key)
    closed = Memory.closed
    with pytest.raises(UserError, match=r"does not start \(No API key.* log in\.\).*WANDB_MODE=offline"):
        run(tracked)
    assert Memory.closed == closed + 1
    with pytest.raises(Stopped):
        run(make_config(runtime=runtime), StopAt(6))
    progress = Notes()
    assert run(tracked, progress).is_done()
    assert sum("wandb does not start" in note for note in progress.notes) == 1


def test_tensorboard_has_every_number_once(make_config, store):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    domains = [{"name": "own", "store": str(store)}]
    scored = {"domains": domains, "max_documents": 2, "max_tokens": 64}
    runtime = {"device": "cpu", "threads": 1, "log_every": 1, "trackers": ["tensorboard"]}
    config = make_config(runtime=runtime, eval=scored)
    with pytest.raises(Stopped):
        run(config, StopAt(6))
    directory = run(config)
    found = _in_event_files(accumulator, directory)
    rows = {
        (f"train/{name}", row["step"]): value
        for row in directory.metrics()
        for name, value in row.items()
        if name != "step"
    }
    scores = {(f"eval/own/{s.split}/{s.metric}", s.step): s.value for s in read_scores(directory.scores)}
    assert found == {key: np.float32(value) for key, value in (rows | scores).items()}


def _in_event_files(accumulator, directory) -> dict[tuple[str, int], float]:
    """The values by tag and step, of which there is one each."""
    events = accumulator.EventAccumulator(str(directory.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert len(found) == sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
    return found


def test_tensorboard_gets_the_rows_of_a_time_without_it(make_config):
    """Files began where the session did in which it was named; and a branch lacked what it was begun with."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = {"device": "cpu", "threads": 1, "log_every": 1}
    tracked = plain | {"trackers": ["tensorboard"]}
    for runtime, step in ((plain, 3), (tracked, 6), (plain, 9)):
        with pytest.raises(Stopped):
            run(make_config(runtime=runtime), StopAt(step))
    directory = run(make_config(runtime=tracked))
    found = _in_event_files(accumulator, directory)
    losses = {step: value for (tag, step), value in found.items() if tag == "train/loss"}
    assert losses == {row["step"]: np.float32(row["loss"]) for row in directory.metrics()}
    assert [*losses] == [*range(1, 13)]


def test_students_of_a_cohort_are_runs_of_their_own_in_weights_and_biases(make_config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runtime = {"device": "cpu", "threads": 1, "log_every": 3, "trackers": ["wandb"]}
    configs = [make_config(name=f"tiny-{seed}", seed=seed, runtime=runtime) for seed in (1, 2)]
    for directory in run_cohort(configs):
        (file,) = (directory.path / "wandb").glob(f"offline-run-*/run-{directory.id}.wandb")
        losses = {row["step"]: row["loss"] for row in _wandb_rows(file.read_bytes())}
        assert losses == {row["step"]: row["loss"] for row in directory.metrics()}


def _wandb_rows(data: bytes) -> list[dict[str, float]]:
    """The rows in a .wandb file: LevelDB's log format after seven bytes, one message per record."""
    from wandb.proto import wandb_internal_pb2

    rows, at, parts = [], 7, b""
    while at + 7 < len(data):
        if (room := 32_768 - at % 32_768) < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts = (b"" if kind in (1, 2) else parts) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            rows += [{name: json.loads(value) for name, value in values.items()}] if values else []
    return rows


def test_students_of_a_cohort_are_runs_of_their_own_in_trackio(make_config, monkeypatch):
    """Each is open until it ends: its rows are there while the others train."""
    trackio = pytest.importorskip("trackio")
    ended = []
    finish = trackio.Run.finish
    monkeypatch.setattr(trackio.Run, "finish", lambda self: (ended.append(self.name), finish(self)))
    runtime = {"device": "cpu", "threads": 1, "log_every": 3, "trackers": ["trackio"]}
    configs = [make_config(name=f"tiny-{seed}", seed=seed, runtime=runtime) for seed in (1, 2)]
    directories = run_cohort(configs)
    assert sorted(ended) == sorted(directory.id for directory in directories)


def test_missing_package_is_said_with_its_remedy(make_config, tmp_path, monkeypatch):
    def absent(directory, config, step, past):
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", absent)
    with pytest.raises(UserError, match=r"install .*\[trackers\]'"):
        trackers.Trackers(make_config(runtime={"trackers": ["wandb"]}), tmp_path, 0)
