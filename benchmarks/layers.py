"""What a document mask, recomputed activations and compiled layers cost a training step, and save.

CPU time: all settings in this process in turn, one thread, the median over rounds and of the ratios to the
plain step within a round. Memory: one process per setting, the rise of its high-water mark in its first step
above what it held before, which is the weights; not of compiled layers, whose first step runs the compiler.

    python benchmarks/layers.py [--shape nano-2m] [--length 1024] [--sequences 4] [--rounds 5] [--compile]
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.train.step import train_step
from tutelage.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from tutelage.train.student import Student

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, eager attention": {"attention": "eager"},
    "document mask": {"mask": True},
    "document mask, eager attention": {"mask": True, "attention": "eager"},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "document mask, selective": {"mask": True, "recompute": "selective"},
}
COMPILED = {
    "compiled": {"compile": True},
    "compiled, document mask, selective": {"compile": True, "mask": True, "recompute": "selective"},
}


def student_of(name: str, store: str, arguments: argparse.Namespace) -> Student:
    """A student with one of the settings."""
    chosen = (SETTINGS | COMPILED)[name]
    student = opened(
        {
            "model": {"shape": arguments.shape, "attn_implementation": chosen.get("attention")},
            "data": {
                "store": store,
                "sequence_length": arguments.length,
                "document_mask": chosen.get("mask", False),
            },
            "tokens": "100M",
            "global_batch_tokens": arguments.length * arguments.sequences,
            "optim": {"warmup": 0.0},
            "runtime": {
                "device": "cpu",
                "threads": 1,
                "compile": chosen.get("compile", False),
                "activation_checkpointing": chosen.get("recompute", "none"),
            },
        }
    )
    student.model.train()
    return student


def step(student: Student) -> None:
    """One step as the loop takes it."""
    watch = Stopwatch(student.world.device, running=False)
    train_step([student.step_inputs(student.step)], [student.loader.batch(student.step)], watch)
    student.step += 1


def high_water() -> float:
    """MiB of the process at its peak since the mark was cleared."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def peak(name: str, store: str, arguments: argparse.Namespace) -> None:
    """Print the MiB that a step adds at its peak; a short step before it loads every library."""
    short = argparse.Namespace(**vars(arguments) | {"shape": "nano-20k", "length": 64, "sequences": 1})
    step(student_of(name, store, short))
    student = student_of(name, store, arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    step(student)
    print(high_water() - before)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano-2m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("SETTING", "STORE"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(*arguments.peak, arguments)
        return
    names = [*SETTINGS, *(COMPILED if arguments.compile else ())]
    options = [f"--{key}={value}" for key, value in vars(arguments).items() if key not in {"peak", "compile"}]
    with tempfile.TemporaryDirectory() as directory:
        corpus = StoreConfig.model_validate_json(
            '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]}'
        )
        store = str(build_store(corpus, Path(directory)))
        students = {name: student_of(name, store, arguments) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            for name, student in students.items():
                began = time.process_time()
                step(student)
                times[name].append(time.process_time() - began)
        memory = {
            name: float(
                subprocess.run(
                    [sys.executable, __file__, *options, "--peak", name, store],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for name in SETTINGS
        }
    batch = arguments.length * arguments.sequences
    print(f"{arguments.shape}, {arguments.sequences} x {arguments.length} = {batch} tokens a step, float32")
    base = times["plain"][1:]
    for name in names:
        ratio = statistics.median(t / b for b, t in zip(base, times[name][1:], strict=True))
        median = statistics.median(times[name][1:])
        mebibytes = f"{memory[name]:.0f}" if name in memory else ""
        print(f"| {name} | {median:.2f} | {ratio:.2f} | {mebibytes} |")


if __name__ == "__main__":
    main()
