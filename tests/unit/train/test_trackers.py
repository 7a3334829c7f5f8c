from __future__ import annotations

import pytest

from tutelage.errors import UserError
from tutelage.run import run
from tutelage.train import trackers


class Memory:
    """A tracker that keeps its rows."""

    rows: list[dict[str, float]] = []  # noqa: RUF012 - shared on purpose: the run makes its own instance
    closed = 0

    def __init__(self, directory, config):
        assert config["name"] == "tiny"
        assert directory.name.startswith("tiny-")

    def log(self, row):
        self.rows.append(dict(row))

    def close(self):
        type(self).closed += 1


def test_trackers_get_every_row_and_are_closed(make_config, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Memory)
    run(make_config(runtime={"device": "cpu", "threads": 1, "log_every": 3, "trackers": ["trackio"]}))
    assert [row["step"] for row in Memory.rows] == [3, 4, 6, 8, 9, 12]  # log steps and checkpoints
    assert Memory.closed == 1


def test_tensorboard_writes_events(make_config):
    pytest.importorskip("tensorboard")
    directory = run(make_config(runtime={"device": "cpu", "threads": 1, "trackers": ["tensorboard"]}))
    assert list((directory.path / "tensorboard").glob("events*"))


def test_missing_package_is_said_with_its_remedy(tmp_path, monkeypatch):
    def absent(directory, config):
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", absent)
    with pytest.raises(UserError, match=r"install .*\[trackers\]'"):
        trackers.open_tracker("wandb", tmp_path, {})
