"""A small compressed file of a gigabyte of text costs what is asked of it, and not its gigabyte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_gigabyte_in_a_small_file_takes_neither_its_memory_nor_its_time():
    script = Path(__file__).parents[2] / "support" / "bombs.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=280
    )
    found = json.loads(done.stdout)
    assert len(found) == 9
    for name, (seconds, mebibytes, size) in found.items():
        assert size < 4e6, name
        assert seconds < 3, name
        assert mebibytes < 1000, name
