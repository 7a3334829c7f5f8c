"""The demo from nothing to its report, small, with an interruption."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import polars as pl
import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_interrupted_and_finished(tutelage, tmp_path):
    output = tmp_path / "demo"
    command = [
        sys.executable,
        "-m",
        "tutelage",
        "demo",
        "--quick",
        "--seeds",
        "1",
        "--output",
        str(output),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/model/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    finished = {
        path.parent.parent: path.stat().st_mtime_ns for path in output.glob("runs/*/model/config.json")
    }
    assert finished
    done = tutelage(*command[3:])
    assert re.search(r"\bweak +(weaker|same-level|stronger)", done.stdout)
    plan = json.loads((output / "plan.json").read_text())
    assert len(plan["runs"]) == 3 + 1 + (3 * 2 + 1)
    for run in plan["runs"]:
        directory = output / "runs" / run["run"]
        assert json.loads((directory / "state.json").read_text())["status"] == "done"
        scores = pl.read_ndjson(directory / "scores.jsonl")
        assert scores["domain"].n_unique() == 5
        assert (scores.filter(metric="bits_per_byte")["value"] < 8).all()
    for directory, time_written in finished.items():
        assert (directory / "model" / "config.json").stat().st_mtime_ns == time_written  # kept, not redone
    first = (output / "report.html").read_bytes()
    tutelage("report", output)
    assert (output / "report.html").read_bytes() == first
    for name in ("weak", "same-level", "strong", "unigram"):
        assert name.encode() in first
