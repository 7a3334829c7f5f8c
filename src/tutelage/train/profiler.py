"""Record some steps with torch's profiler (`runtime.profile`), as a trace that Perfetto and Chrome open."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tutelage.files import atomic_write, make_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tutelage.progress import Progress
    from tutelage.train.distributed import World

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
        yield _nothing
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


def _nothing() -> None:
    """Do what a profiler does that is not asked for."""
