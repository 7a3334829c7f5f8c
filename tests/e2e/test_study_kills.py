"""Kill the runs and the runners of a study over and over; its results are those of a study left in peace."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 20
STUDY = """
name: killed
title: Does it survive?
corpus:
  name: speeches
  sources: [{kind: corpus, name: sotu}]
  tokenizer: {vocab_size: 300}
  validation: 0.2
  test: 0.2
  max_bytes: 600000
domains:
  medicine: {source: {kind: corpus, name: medicine}}
teachers:
  small: {shape: nano-20k, tokens: 60K}
  large: {shape: nano-50k, tokens: 60K}
students:
  mixing:
    shape: nano-20k
    tokens: 60K
    grid: {product: {teacher: [small, large], alpha: [0.2, 0.8]}}
seeds: [43, 44]
run:
  data: {sequence_length: 64}
  global_batch_tokens: 512
  checkpoint: {every: 5K, keep: 1}
  eval: {max_documents: 4, max_tokens: 128}
  runtime: {device: cpu, threads: 1, log_every: 5}
"""


def command(folder, output):
    return [
        *(sys.executable, "-m", "tutelage", "study", "run", str(folder / "study.yaml")),
        *("--output", str(output), "--workers", "1", "--retries", "1000"),
    ]


def start(folder, output):
    with (folder / "errors.txt").open("a") as errors:
        return subprocess.Popen(command(folder, output), stdout=subprocess.DEVNULL, stderr=errors)


def parents():
    """Parent of every process, zombies left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def offspring(pid):
    found, known = [pid], parents()
    for one in found:
        found += [child for child, parent in known.items() if parent == one]
    return found[1:]


def results(output):
    names = ("model/model.safetensors", "scores.jsonl", "documents.parquet")
    return {
        f"{run.name}/{name}": (run / name).read_bytes()
        for run in sorted((output / "runs").iterdir())
        for name in names
    }


def is_finished(output):
    if not (output / "plan.json").exists():
        return False
    runs = [run["run"] for run in json.loads((output / "plan.json").read_text())["runs"]]
    states = [output / "runs" / run / "state.json" for run in runs]
    return all(path.exists() and json.loads(path.read_text())["status"] == "done" for path in states)


def written(output):
    """Bytes of learning curves and scores: they grow while a run trains or is scored."""
    sizes = 0
    for path in [*output.glob("runs/*/metrics.jsonl"), *output.glob("runs/*/scores.jsonl")]:
        with contextlib.suppress(FileNotFoundError):
            sizes += path.stat().st_size
    return sizes


def wage_war(folder, output, runners, dice):
    """Kill one of the runners or a process of theirs when work goes on; replace runners that ended."""
    kills = {"runner": 0, "run": 0}
    seen = 0
    while not is_finished(output):
        time.sleep(dice.uniform(0.05, 0.5))
        for place, runner in enumerate(runners):
            if runner.poll() is not None:
                runners[place] = start(folder, output)
        if sum(kills.values()) >= KILLS or written(output) == seen:
            continue
        which = dice.randrange(2)
        workers = offspring(runners[which].pid)
        if dice.random() < 0.25:
            runners[which].kill()
            kills["runner"] += 1
        elif workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(workers), signal.SIGKILL)
                kills["run"] += 1
        seen = written(output)
    return kills


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.timeout(600)
def test_kills_at_random_moments_change_no_result(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    peace, war = tmp_path / "peace", tmp_path / "war"
    subprocess.run(command(tmp_path, peace), check=True, capture_output=True)
    runners = [start(tmp_path, war), start(tmp_path, war)]
    try:
        kills = wage_war(tmp_path, war, runners, random.Random(1))  # noqa: S311 - no secret
        for runner in runners:
            assert runner.wait(300) == 0, (tmp_path / "errors.txt").read_text()
    finally:
        for runner in runners:
            runner.kill()
            runner.wait()
    assert sum(kills.values()) >= KILLS
    assert min(kills.values()) >= 3
    assert results(war) == results(peace)
