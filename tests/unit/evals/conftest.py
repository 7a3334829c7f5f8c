"""A finished run, trained once for all tests of evaluations."""

from __future__ import annotations

import shutil

import pytest

from tutelage.run import run
from tutelage.run_directory import RunDirectory


@pytest.fixture(scope="session")
def trained_once(tiny_config, tmp_path_factory):
    return run(tiny_config(tmp_path_factory.mktemp("trained") / "runs"))


@pytest.fixture
def tiny_run(trained_once, tmp_path):
    """A run of 12 steps; a copy, so that a test may write to it."""
    return RunDirectory(shutil.copytree(trained_once.path, tmp_path / "runs" / trained_once.id))
