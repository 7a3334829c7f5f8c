"""Cut the power: a command stops at a random moment, and goes on with what was on the disk by then.

Half of the moments lie just before a change or a flush of a file, by its number; the others are a random part
of the undisturbed time, where the processes of a study write too.

The disk is an ext4 image, which is copied at that moment without being flushed; the command is killed, and
the copy takes the disk's place under the same path. Some of the disks write names before contents
(`data=writeback`) and do not flush files that are renamed (`noauto_da_alloc`).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from typing import TYPE_CHECKING

from campaigns.commands import Command, kill_at, on_changes, session
from campaigns.judging import LOST, Verdict, broken, finish
from campaigns.mounts import PowerCutDisk
from campaigns.world import MOST_REDONE, TASKS, last_steps, steps_redone

if TYPE_CHECKING:
    import random

    from campaigns.world import Task, World

_OPTIONS = (
    "data=ordered",
    "data=ordered,commit=1",
    "data=ordered,noauto_da_alloc,nodelalloc",
    "data=writeback,noauto_da_alloc",
    "data=writeback,noauto_da_alloc,commit=1",
)


def cut(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Cut the power of a command's disk, and run the command again on what is left."""
    task = TASKS[name]
    truth = world.truth(task)
    options = dice.choice(_OPTIONS)
    number, part = dice.randint(1, truth.changes + truth.changes // 10), dice.random()
    if dice.random() < 0.5:
        moment = f"before change {number} of {truth.changes}"
        prepare = on_changes(kill_at(number, signal.SIGSTOP))
    else:
        moment, prepare = f"after {part:.0%} of the time", None
    disk = PowerCutDisk(world.place, options)
    try:
        world.restore(task.start)
        os.sync()
        command = Command(world.arguments(task), world.place, prepare=prepare)
        _wait(command, None if prepare else part * truth.seconds)
        return _cut(world, task, disk, command, f"power cut {moment}, {options}")
    finally:
        disk.remove()


def _wait(command: Command, seconds: float | None) -> None:
    """Wait for some seconds, or until the command has stopped itself."""
    (process,) = command.processes
    end = command.began + (math.inf if seconds is None else seconds)
    while not command.poll() and not _is_stopped(process) and time.monotonic() < end:
        time.sleep(0.005)


def _cut(world: World, task: Task, disk: PowerCutDisk, command: Command, words: str) -> Verdict:
    """Cut the power of a command now, and run it again."""
    (process,) = command.processes
    for one in session(process):
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(one, signal.SIGSTOP)
    before = last_steps(world.place)
    disk.copy()
    command.sweep()
    outcome = command.wait()
    disk.restart()
    if kind := broken(outcome):
        return Verdict(kind, f"{words}: {outcome.code} {outcome.complaint}")
    redone = steps_redone(world.place, before)
    if redone is not None and redone > MOST_REDONE:
        return Verdict(LOST, f"{words}: {redone} steps are done again")
    return finish(world, task, words, redone)


def _is_stopped(process: int) -> bool:
    with open(f"/proc/{process}/stat", encoding="utf-8") as file:  # noqa: PTH123 - hundreds of times a second
        return file.read().rsplit(")", 1)[1].split()[0] == "T"
