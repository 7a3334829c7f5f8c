from __future__ import annotations

import pytest
from training import StopAt

from tutelage.errors import Stopped, UserError
from tutelage.evals.score_files import read_scores
from tutelage.run import run
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


def test_tensorboard_writes_events(make_config):
    pytest.importorskip("tensorboard")
    directory = run(make_config(runtime={"device": "cpu", "threads": 1, "trackers": ["tensorboard"]}))
    assert list((directory.path / "tensorboard").glob("events*"))


def test_missing_package_is_said_with_its_remedy(make_config, tmp_path, monkeypatch):
    def absent(directory, config, step, past):
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", absent)
    with pytest.raises(UserError, match=r"install .*\[trackers\]'"):
        trackers.open_trackers(make_config(runtime={"trackers": ["wandb"]}), tmp_path, 0)
