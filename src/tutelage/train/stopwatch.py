"""Time the parts of a training step, and record some steps with torch's profiler (`runtime.profile`).

On a GPU the marks are events in its queue, which are read when a row of the log waits for the device anyway.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tutelage.files import atomic_write, make_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from tutelage.progress import Progress
    from tutelage.train.distributed import World

    Mark = float | torch.cuda.Event


TEACHER, FORWARD, OBJECTIVE, BACKWARD, OPTIMIZER = PARTS = (
    "teacher",
    "forward",
    "objective",
    "backward",
    "optimizer",
)
"""Of a step, besides the wait for data."""


class Stopwatch:
    """Laps of one training step. A part takes from the mark before it to its own.

    Several students may take the step together: what belongs to one of them has its place among them as
    owner, what they share has none.

    Args:
        device: that the step is computed on.
        running: whether to measure at all; otherwise nothing here costs anything.
    """

    def __init__(self, device: torch.device, *, running: bool) -> None:
        self._device = device
        self._running = running
        self._marks: list[tuple[str, int | None, Mark]] = []

    def lap(self, part: str, owner: int | None = None) -> None:
        """Say that a part has ended; the first call only starts the watch."""
        if self._running:
            self._marks.append((part, owner, self._now()))

    @contextlib.contextmanager
    def follow(self, heads: Iterator[nn.Module]) -> Iterator[None]:
        """Mark the ends of the forward pass and of the objective around the calls of each student's head.

        Weights that are gathered for a call are so before the mark, so the objective is this process's own
        computation, without a message.
        """
        with contextlib.ExitStack() as hooks:
            for owner, head in enumerate(heads if self._running else ()):
                lap = partial(self._hooked, owner)
                hooks.callback(head.register_forward_pre_hook(partial(lap, FORWARD)).remove)
                hooks.callback(head.register_forward_hook(partial(lap, OBJECTIVE)).remove)
            yield

    def seconds(self, owner: int) -> dict[str, float]:
        """Seconds of each part of one student's step, and of those it shares; waits for the device.

        Empty if the watch was not running.
        """
        found: dict[str, float] = defaultdict(float)
        for (_, _, before), (part, whose, mark) in zip(self._marks, self._marks[1:], strict=False):
            if whose in (owner, None):
                found[part] += _between(before, mark)
        return dict(found)

    def _hooked(self, owner: int, part: str, *_: object) -> None:
        self.lap(part, owner)

    def _now(self) -> Mark:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def _between(before: Mark, after: Mark) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float) and isinstance(after, float)  # noqa: S101, PT018 - of one device
        return after - before
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1e3


_BEFORE = 10
"""Steps that are left out first: they compile, choose kernels and fill caches."""
_WARM_UP = 2
"""The last of these run with the profiler on, so that its own start is not in the trace."""


@contextlib.contextmanager
def profiled(
    steps: int, left: int, directory: Path, world: World, progress: Progress
) -> Iterator[Callable[[], None]]:
    """Record `steps` steps of the block, after ten others, into `directory`/rank-N.json.

    A run with fewer steps left is recorded from where as many remain.

    Args:
        steps: how many, at most those that are left; with 0 nothing is recorded.
        left: how many the run still has to take.
        directory: made if it does not exist.
        world: every process writes a file of its own.
        progress: is told where it is, by the first process.

    Yields:
        A function to call after every step.
    """
    steps = min(steps, left)
    if steps == 0:
        yield lambda: None
        return
    path = directory / f"rank-{world.rank}.json"

    def write(recorder: profile) -> None:
        make_directory(directory)
        with atomic_write(path) as partial:
            recorder.export_chrome_trace(str(partial))
        if world.is_main:
            progress.note(
                f"{path}: the trace of {steps} steps; open it at ui.perfetto.dev or chrome://tracing"
            )

    before = min(_BEFORE, left - steps)
    warm_up = min(_WARM_UP, before)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available() and world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=before - warm_up, warmup=warm_up, active=steps, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True
    ) as recorder:
        yield recorder.step
