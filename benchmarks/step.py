"""How much of the bare model's speed the training step keeps.

Bare: forward, cross-entropy over whole logits, backward, nothing else. Ours: the whole training step with the
loader, the chunked objective, clipping, AdamW and the loop's bookkeeping; also without the guard against
losses that are not finite, and with every step timed, where only logged ones are. All in this process, in
turn, one CPU thread; the ratio is the median over rounds of CPU seconds per step.

    python benchmarks/step.py [--shape nano-150k] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from students import opened
from tutelage.config.data_config import StoreConfig
from tutelage.data.build import build_store
from tutelage.train.optim import learning_rate
from tutelage.train.step import train_step
from tutelage.train.stopwatch import Stopwatch
from tutelage.train.student import StepInputs, Student

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STEPS = 8


def bare(student: Student) -> Callable[[int], None]:
    """Forward, loss, backward, with the batch already in memory."""
    batch = student.loader.batch(0)
    model = student.model

    def step(_: int) -> None:
        logits_BTV = model(input_ids=batch.tokens_BT, use_cache=False).logits
        F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


class Unguarded:
    """Stands where the guard does, and looks at nothing."""

    skipped = torch.zeros(())

    def check(self, *_: Tensor) -> None:
        """Let every update be made; the optimizer gets no tensor to look at either."""

    def newest(self, step: int, *, wait: bool) -> None:
        """Know of no skipped step."""


def ours(student: Student, alpha: float, *, timed: bool = False) -> Callable[[int], None]:
    """The step as the loop takes it."""

    def step(index: int) -> None:
        lr = learning_rate(
            student.config.optim,
            student.lr,
            index,
            student.steps,
            batch_tokens=student.config.global_batch_tokens,
        )
        watch = Stopwatch(student.world.device, running=timed)
        train_step([StepInputs(student, alpha, lr)], [student.loader.batch(index)], watch)
        student.guard.newest(index, wait=False)
        watch.seconds(0)

    return step


def unguarded(student: Student) -> Student:
    """The student without its guard."""
    student.guard = Unguarded()  # type: ignore[assignment]
    return student


def cpu_seconds(step: Callable[[int], None]) -> float:
    """CPU seconds per step over `STEPS` steps."""
    start = time.process_time()
    for index in range(STEPS):
        step(index)
    return (time.process_time() - start) / STEPS


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="nano-150k")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = StoreConfig.model_validate_json(
            '{"name": "sotu", "sources": [{"kind": "corpus", "name": "sotu"}]}'
        )
        store = build_store(corpus, Path(directory))
        common = {
            "model": {"shape": arguments.shape},
            "data": {"store": str(store)},
            "tokens": "1M",
            "runtime": {"device": "cpu", "threads": 1},
        }
        unigram = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.5}}
        setups = {
            "bare forward + backward": bare(opened(common)),
            "training step, no teacher": ours(opened(common), 0.0),
            "the same, unguarded": ours(unguarded(opened(common)), 0.0),
            "the same, every step timed": ours(opened(common), 0.0, timed=True),
            "training step, unigram": ours(opened(common | unigram), 0.5),
        }
        times: dict[str, list[float]] = {name: [] for name in setups}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            for name, step in setups.items():
                times[name].append(cpu_seconds(step))
    tokens = 1024
    base = times["bare forward + backward"][1:]
    print(f"{arguments.shape}, {tokens} tokens a step, float32, 1 thread, torch {torch.__version__}")
    for name, found in times.items():
        share = statistics.median(b / t for b, t in zip(base, found[1:], strict=True))
        median = statistics.median(found[1:])
        print(f"{name:<28}{1e3 * median:8.1f} ms CPU {tokens / median:10,.0f} tokens/s {share:7.0%} of bare")


if __name__ == "__main__":
    main()
