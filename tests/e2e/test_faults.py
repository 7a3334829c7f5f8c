"""A small campaign of faults, of a fixed seed: what is disturbed ends undisturbed, or says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks for processes in /proc")
@pytest.mark.timeout(600)
def test_nothing_of_a_small_campaign_is_wrong():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seed", "1", "--small"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nall " in done.stdout
