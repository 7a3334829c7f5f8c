"""Cut the power: a command stops at a random change of a file, and goes on with what was on the disk by then.

The disk is an ext4 image, which is copied at that moment without being flushed; the command is killed, and
the copy takes the disk's place under the same path. Some of the disks write names before contents
(`data=writeback`) and do not flush files that are renamed (`noauto_da_alloc`).
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from campaigns.commands import Command, on_changes, session
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
    number = dice.randint(1, truth.changes + truth.changes // 10)
    disk = PowerCutDisk(world.place, options)
    try:
        world.restore(task.start)
        os.sync()
        words = f"power cut before change {number} of {truth.changes}, {options}"
        return _cut(world, task, disk, number, words)
    finally:
        disk.remove()


def _cut(world: World, task: Task, disk: PowerCutDisk, number: int, words: str) -> Verdict:
    def stop(seen: int) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    command = Command(world.arguments(task), world.place, prepare=on_changes(stop))
    (process,) = command.processes
    while not command.poll() and not _is_stopped(process):
        time.sleep(0.005)
    for one in session(process):
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
