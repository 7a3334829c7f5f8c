"""Measure the speed, memory and cost of a run between two rows of metrics.jsonl.

Of several processes, the first writes what all together did: their tokens, the largest wait and memory.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING

import torch

from tutelage.models.devices import recognise_device
from tutelage.train import distributed
from tutelage.train.stopwatch import OBJECTIVE, TEACHER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.train.distributed import World

MEASURED = frozenset(
    {
        "seconds",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "mfu",
        "peak_memory_gib",
        "data_wait",
        "teacher_share",
        "seconds_teacher",
        "seconds_forward",
        "seconds_objective",
        "seconds_backward",
        "seconds_optimizer",
        "crc32",
    }
)
"""Fields of a row that depend on the machine and its load too, and not on config and data alone."""

_TRIAL = 512
_TRIALS = 5


class Meter:
    """Clock and counters of one run.

    Args:
        world: this process among all.
        batch_tokens: tokens of a step, over all processes.
        dtype: compute dtype.

    Attributes:
        peak: operations per second that a device can reach at most.
        peak_source: where that is from.
        own_seconds: of each rank, since the row before: seconds per step of waiting for data and in the
            objective of the measured step. No rank waits for another in them, so a slow one shows.
    """

    def __init__(self, world: World, batch_tokens: int, dtype: torch.dtype) -> None:
        self.peak, self.peak_source = peak_flops(world.device, dtype)
        self.own_seconds: list[float] = []
        self._world = world
        self._batch_tokens = batch_tokens
        self._start = self._last = 0.0
        self._step = 0
        self._teacher_tokens = 0
        self._waited = 0.0

    def start(self, step: int, teacher_tokens: int, seconds: float) -> None:
        """Go on after a step, when the run has taken `seconds` in earlier sessions."""
        self._last = time.perf_counter()
        self._start = self._last - seconds
        self._step, self._teacher_tokens, self._waited = step, teacher_tokens, 0.0

    @property
    def seconds(self) -> float:
        """Training time over all sessions of the run."""
        return time.perf_counter() - self._start

    def pause(self, seconds: float) -> None:
        """Do not count time that was no training."""
        self._start += seconds
        self._last += seconds

    def wait(self, seconds: float) -> None:
        """Count time in which nothing could be computed, because a batch was not there yet."""
        self._waited += seconds

    def measure(
        self,
        step: int,
        teacher_tokens: int,
        flops: tuple[float, float],
        parts: Mapping[str, float],
    ) -> dict[str, float]:
        """Return the measured fields of a row, for all steps since the row before.

        All processes call this together.

        Args:
            step: steps taken.
            teacher_tokens: tokens the teacher has been run on.
            flops: per token of the student's training and of the teacher's forward pass.
            parts: seconds of the parts of this step; empty if they were not measured.
        """
        now = time.perf_counter()
        steps, elapsed = step - self._step, max(now - self._last, 1e-9)
        tokens = steps * self._batch_tokens
        work = flops[0] * tokens + flops[1] * (teacher_tokens - self._teacher_tokens)
        own = self._waited / max(1, steps) + parts.get(OBJECTIVE, 0.0)
        mine = [own, self._waited / elapsed, peak_memory(self._world.device)]
        everyones = distributed.gather(torch.tensor(mine, dtype=torch.float32, device=self._world.device))
        self.own_seconds = everyones[:, 0].tolist()
        _, waited, memory = everyones.amax(0).tolist()
        self._step, self._teacher_tokens, self._last, self._waited = step, teacher_tokens, now, 0.0
        speed = tokens / elapsed
        row = {
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / self._world.size, 1),
            "mfu": work / elapsed / (self.peak * self._world.size),
            "peak_memory_gib": memory / 2**30,
            "data_wait": waited,
            "seconds": round(now - self._start, 3),
        }
        if parts:
            row["teacher_share"] = parts.get(TEACHER, 0.0) / max(sum(parts.values()), 1e-9)
        row |= {f"seconds_{part}": seconds for part, seconds in parts.items()}
        return {name: round(value, 6) for name, value in row.items()}


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch has allocated on a GPU, or the high-water mark of this process.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0.0
    import resource  # noqa: PLC0415 - Windows has none

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used if sys.platform == "darwin" else 1024 * used)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The operations per second that a device can reach, and where the figure is from.

    By its data sheet (dense, bf16) if it is known, else the best of a few products of matrices here.
    """
    if device.type == "cuda":
        known = recognise_device(torch.cuda.get_device_name(device))
        if known is not None:
            return known.peak_flops, known.summary
    size = _TRIAL if device.type == "cpu" else 8 * _TRIAL
    a = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(a)
    seconds = []
    for _ in range(_TRIALS + 1):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=product)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    return 2 * size**3 / min(seconds[1:]), f"measured: products of {size} x {size} matrices in {name}"


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
