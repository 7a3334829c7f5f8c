"""Two runners work on one study with clocks that are hours apart; one of them may be killed on the way.

Only what Python programs read as the time of day is moved, in each runner and the processes that it starts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from campaigns.commands import Command, Outcome
from campaigns.judging import LOST, TRACEBACK, Verdict, broken, finish
from campaigns.world import TASKS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from campaigns.world import World

_MOVED = """
import os, time
_now, _now_ns = time.time, time.time_ns
_offset = float(os.environ["CLOCK_OFFSET"])
time.time = lambda: _now() + _offset
time.time_ns = lambda: _now_ns() + int(_offset * 1e9)
"""
_OFFSETS = (60.0, 3600.0, 90_000.0, 1e9)


def run_apart(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Run a study by two runners, one with a clock that is wrong."""
    task = TASKS[name]
    truth = world.truth(task)
    world.restore(task.start)
    offset = dice.choice(_OFFSETS) * dice.choice([1, -1])
    killed = dice.choice([None, 0, 1])
    moved = world.place / "clock"
    moved.mkdir()
    (moved / "sitecustomize.py").write_text(_MOVED, encoding="utf-8")
    runners = [
        Command(
            world.arguments(task),
            world.place,
            prepare=_move(by),
            environment={"CLOCK_OFFSET": str(by), "PYTHONPATH": os.pathsep.join([str(moved), *sys.path])},
        )
        for by in (0.0, offset)
    ]
    words = f"clocks {offset:+g} s apart"
    if killed is not None:
        part = dice.random()
        words += f", runner {killed} killed after {part:.0%} of the time"
        time.sleep(part * truth.seconds)
        runners[killed].send(signal.SIGKILL)
    outcomes = [runner.wait() for runner in runners]
    for runner in runners:
        runner.sweep()
    return _judged(world, name, outcomes, words, killed)


def _move(offset: float) -> Callable[[int], None]:
    """Move the clock of a process that was forked, and so does not read `sitecustomize.py`."""

    def prepare(_: int) -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + offset
        time.time_ns = lambda: now_ns() + int(offset * 1e9)

    return prepare


def _judged(world: World, name: str, outcomes: list[Outcome], words: str, killed: int | None) -> Verdict:
    for number, outcome in enumerate(outcomes):
        if number != killed and (outcome.code or broken(outcome)):
            kind = broken(outcome) or (LOST if outcome.code == 2 else TRACEBACK)
            return Verdict(kind, f"{words}; runner {number}: {outcome.code} {outcome.complaint}")
    return finish(world, TASKS[name], words)
