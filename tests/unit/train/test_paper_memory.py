"""A size of the paper's runs takes its two steps on eight processes that are not there, as planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "paper_memory.py"


@pytest.mark.slow
def test_the_formula_is_near_the_trace_of_the_main_student():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "llama-1.7b"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    head, row = (line.split(" | ") for line in done.stdout.splitlines())
    found = dict(zip(head, row, strict=True))
    assert (found["size"], found["devices"]) == ("llama-1.7b", "8")
    assert 15 < float(found["traced GB"]) < 20
    assert float(found["formula GB"]) == pytest.approx(float(found["traced GB"]), rel=0.12)
