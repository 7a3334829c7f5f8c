"""Whatever files hold, it is used or refused: in one line, at once, in bounded memory, leaving nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "support" / "fuzzed_input.py"
FAMILIES = 13


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_hostile_input_is_used_or_refused(cases):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(cases)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failures"], "\n".join(f"{what}: {how}" for what, how in found["failures"].items())
    assert len(found["cases"]) == FAMILIES
    assert sum(found["cases"].values()) >= cases
    for family, tried in found["cases"].items():  # both happen, or the cases would be idle
        refused = found["refused"].get(family, 0)
        assert refused, family
        assert refused < tried or family in {"yaml", "plans", "indexes", "weights"} or tried < 20, family
    assert found["grown"] < 2**30
