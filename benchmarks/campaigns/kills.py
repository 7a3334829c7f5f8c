"""Kill, end or hang up commands at random moments, and run the same command again.

Half of the moments lie just before a change of a file, by its number, so that they are the same on every
machine; the others are a random part of the undisturbed time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from campaigns.commands import Command, kill_at, on_changes, session
from campaigns.judging import HANG, LOST, TRACEBACK, Verdict, broken, finish
from campaigns.world import MOST_REDONE, TASKS, steps_redone

if TYPE_CHECKING:
    import random

    from campaigns.commands import Outcome
    from campaigns.world import Task, World

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT)
_LAUNCHER_SECONDS = 2.0
"""How long a launcher waits before it ends the processes that another one has left alone."""
_END_SECONDS = 60.0
_ENDINGS = {0, 1, 2, 130, *(-number for number in SIGNALS)}
"""Exit codes of a command that got a signal; a process whose partner was killed ends with an error."""


def kill_command(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Send a signal to a command, or to one of its processes, and run it again."""
    task = TASKS[name]
    truth = world.truth(task)
    world.restore(task.start)
    sent, rank = dice.choice(SIGNALS), dice.randrange(task.ranks)
    number, part, everyone = dice.randint(1, truth.changes), dice.random(), dice.random() < 0.5
    if dice.random() < 0.5:
        words = f"{sent.name} before change {number} of {truth.changes}"
        prepare = on_changes(kill_at(number, sent))
        command = Command(world.arguments(task), world.place, ranks=task.ranks, prepare=prepare)
    else:
        words = f"{sent.name} after {part:.0%} of the time" + ("" if everyone else f" to rank {rank}")
        command = Command(world.arguments(task), world.place, ranks=task.ranks)
        time.sleep(part * truth.seconds)
        command.send(sent, None if everyone else rank)
    return _again(world, task, _end_as_a_launcher_does(command), words)


def kill_study(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Send a signal to the runner of a study, to one of its workers or to the server that forks them."""
    task = TASKS[name]
    truth = world.truth(task)
    world.restore(task.start)
    sent = dice.choice(SIGNALS)
    victim = dice.choice(["runner", "worker", "fork server"])
    part = dice.random()
    command = Command(world.arguments(task), world.place)
    time.sleep(part * truth.seconds)
    (runner,) = command.processes
    words = f"{sent.name} to the {victim} after {part:.0%} of the time"
    for process in _processes(runner)[victim]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, sent)
    outcome = command.wait()
    # What a killed runner has left is not swept away: the next one has to live with it.
    verdict = _again(world, task, outcome, words)
    command.sweep()
    return verdict


def _processes(runner: int) -> dict[str, list[int]]:
    """The processes of a study: workers are children of the fork server, which is one of the runner."""
    parents = {}
    for process in session(runner):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
            parents[process] = int(text.rsplit(")", 1)[1].split()[1])
    servers = [
        one for one, parent in parents.items() if parent == runner and "forkserver" in _command_line(one)
    ]
    workers = [one for one, parent in parents.items() if parent in servers]
    return {"runner": [runner], "fork server": servers, "worker": workers}


def _command_line(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8")
    return ""


def _end_as_a_launcher_does(command: Command) -> Outcome:
    """Wait; end the processes that are left alone by one that died."""
    alone = None
    while not command.poll() and time.monotonic() < command.began + _END_SECONDS:
        if alone is None and any(code is not None for code in command.processes.values()):
            alone = time.monotonic()
        if alone is not None and time.monotonic() > alone + _LAUNCHER_SECONDS:
            command.send(signal.SIGTERM)
            alone = time.monotonic() + _END_SECONDS
        time.sleep(0.02)
    return command.wait(_END_SECONDS)


def _again(world: World, task: Task, outcome: Outcome, words: str) -> Verdict:
    """Judge how the disturbed command ended, and the same command after it."""
    if outcome.hung:
        return Verdict(HANG, words)
    if (kind := broken(outcome)) is not None:
        return Verdict(kind, f"{words}: {outcome.code} {outcome.complaint}")
    if outcome.code not in _ENDINGS:
        return Verdict(TRACEBACK, f"{words}: {outcome.code} {outcome.complaint}")
    redone = steps_redone(world.place)
    if redone is not None and redone > MOST_REDONE:
        return Verdict(LOST, f"{words}: {redone} steps are done again")
    return finish(world, task, words, redone)
