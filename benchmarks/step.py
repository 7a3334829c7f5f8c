"""The training step beside a bare loop, teachers beside their ideals, two processes beside one; with aims.

Steps: CPU seconds on one thread, measured in turn in this process; a ratio is the median over rounds.
Bare is a loop tuned by hand: the same model, batches in memory, cross-entropy over whole logits, clipping,
fused AdamW. Ours is the step of `tutelage train`. A teacher's ideal is its forward pass beside the student's
training by FLOPs, 1 + N_T / 3 N_S. Processes: whole runs of `tutelage train`, tokens per second by the clock
and the share of it in which the run waits for data, from the run's own metrics.jsonl.

    python benchmarks/step.py [--shape nano-2m] [--teacher nano-6m] [--vocabulary 4096] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from caching import FORMATS, cached, store_of
from students import opened
from tutelage.models import hub
from tutelage.models.flops import model_forward_flops
from tutelage.models.shapes import find_shape
from tutelage.teachers.live import OnlineTeacher
from tutelage.train.step import train_step
from tutelage.train.student import StepInputs, Student

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, TOKENS, LENGTH, LR = 4, 1024, 128, 1e-4
RUN_STEPS, RUN_TOKENS = 12, 4096
"""Of a whole run, whose first quarter warms up; what processes exchange does not grow with the tokens."""


def bare(student: Student) -> Callable[[int], None]:
    """A loop of one's own, for one model."""
    model, batch = student.model, student.loader.batch(0)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(_: int) -> None:
        logits_BTV = model(input_ids=batch.tokens_BT, use_cache=False).logits
        F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(student: Student, alpha: float) -> Callable[[int], None]:
    """The step as the loop takes it; a cache is read a step ahead."""

    def step(index: int) -> None:
        if student.teacher is not None:
            student.teacher.prefetch([student.loader.batch(index + 1)])
        train_step([StepInputs(student, alpha, LR)], [student.loader.batch(index)])

    return step


def cpu_seconds(step: Callable[[int], None], first: int) -> float:
    """CPU seconds of `STEPS` steps."""
    start = time.process_time()
    for index in range(first, first + STEPS):
        step(index)
    return time.process_time() - start


def step_rows(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str, str, bool]]:
    """(what, measured, aim, whether it is met) of single steps."""
    store = store_of(folder, f'{{"vocab_size": {arguments.vocabulary}}}', 2_000_000)
    hub.save(
        hub.build(find_shape("nano-50k"), arguments.vocabulary, LENGTH, seed=1), folder / "teacher", store
    )
    teacher = hub.build(find_shape(arguments.teacher), arguments.vocabulary, LENGTH, seed=2)
    common = common_settings(store, arguments.shape, 1)
    taught = common | {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.5}}
    online = opened(taught, OnlineTeacher(teacher, model_forward_flops(teacher, LENGTH)))
    assert online.teacher is not None  # noqa: S101 - just given
    ideal = 1 + online.teacher.forward_flops / online.training_flops
    setups = {
        "bare": bare(opened(common)),
        "alone": ours(opened(common), 0.0),
        "online": ours(online, 0.5),
        "cached": ours(cached(common, FORMATS["min-variance, 16 ids"], folder), 0.5),
    }
    times: dict[str, list[float]] = {name: [] for name in setups}
    for index in range(arguments.rounds + 1):  # the first warms up
        for name, step in setups.items():
            times[name].append(cpu_seconds(step, index * STEPS))

    def ratio(name: str, other: str) -> float:
        return statistics.median(x / y for x, y in zip(times[name][1:], times[other][1:], strict=True))

    for name, found in times.items():
        print(f"{name}: {1e3 * statistics.median(found[1:]) / STEPS:.0f} ms CPU per step", file=sys.stderr)
    speed, kd, stored = ratio("bare", "alone"), ratio("online", "alone"), ratio("cached", "alone")
    return [
        ("step without a teacher, of the bare loop's speed", f"{speed:.2f}", "at least 0.95", speed >= 0.95),
        (
            f"step with {arguments.teacher} online / without; ideal {ideal:.2f}",
            f"{kd:.2f}, {kd / ideal:.2f} x ideal",
            "at most 1.05 x ideal",
            kd <= 1.05 * ideal,
        ),
        ("step with cached samples of 16 ids / without", f"{stored:.2f}", "at most 1.05", stored <= 1.05),
    ]


def common_settings(store: Path, shape: str, threads: int) -> dict[str, Any]:
    """What all runs share."""
    return {
        "model": {"shape": shape},
        "data": {"store": str(store), "sequence_length": LENGTH},
        "tokens": "1M",
        "global_batch_tokens": TOKENS,
        "runtime": {"device": "cpu", "threads": threads},
    }


def whole_run(store: Path, folder: Path, name: str, parallel: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second by the clock of a run of nano-6m on two cores, and its share of waiting for data."""
    threads = 2 // parallel["processes"]
    settings = common_settings(store, "nano-6m", threads) | {
        "name": name,
        "tokens": RUN_STEPS * RUN_TOKENS,
        "global_batch_tokens": RUN_TOKENS,
        "parallel": parallel,
        "output": str(folder / "runs"),
    }
    settings["runtime"] |= {"log_every": RUN_STEPS // 4}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tutelage", "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    directory = next((folder / "runs").glob(f"{name}-*"))
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    return speed, statistics.median(row["data_wait"] for row in rows)


def process_rows(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str, str, bool]]:
    """Two processes on two cores, with a copy each and with one in shards, beside one with two threads."""
    store = store_of(folder, f'{{"vocab_size": {arguments.vocabulary}}}', 2_000_000)
    one, wait = whole_run(store, folder, "one", {"processes": 1})
    copies, wait_copies = whole_run(store, folder, "copies", {"processes": 2, "replicate": 2})
    shards, wait_shards = whole_run(store, folder, "shards", {"processes": 2})
    what = f"nano-6m, {RUN_TOKENS} tokens a step, tokens/s: 2 processes"
    return [
        (f"{what} with a copy each / 1", f"{copies / one:.2f}", "at least 0.85", copies >= 0.85 * one),
        (
            f"{what} with half the model each / 1",
            f"{shards / one:.2f}",
            "at least 0.85",
            shards >= 0.85 * one,
        ),
        (
            "waiting for data, at most, of the three",
            f"{max(wait, wait_copies, wait_shards):.2%}",
            "under 1%",
            max(wait, wait_copies, wait_shards) < 0.01,
        ),
    ]


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano-2m")
    parser.add_argument("--teacher", default="nano-6m")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    when, load = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), os.getloadavg()[0]
    print(
        f"{when}, torch {torch.__version__}, load {load:.1f} at the start; {arguments.shape}, vocabulary ",
        end="",
    )
    print(f"{arguments.vocabulary}, {TOKENS} tokens a step, float32\n")
    print("| | measured | aim | met |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for rows in (step_rows, process_rows):
            for what, measured, aim, met in rows(arguments, Path(directory)):
                print(f"| {what} | {measured} | {aim} | {'yes' if met else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
