"""Damage what lies on the disk, and ask `tutelage verify`: it names the damage, and nothing else.

What nobody reads is not its business: pages, figures and tables for people, locks, heartbeats of runners that
have ended. Files that are made again where they are missing may be lost.
"""

from __future__ import annotations

import fnmatch
import shutil
from typing import TYPE_CHECKING

from campaigns.commands import run
from campaigns.corruptions import DAMAGES, put_back
from campaigns.judging import LOST, RIGHT, SILENT, TRACEBACK, UNCLEAR, Verdict, broken
from campaigns.world import STUDY, TASKS, prepare

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from campaigns.world import World

_WHAT = {
    "store": ("cache", "stores/words-*"),
    "cache": ("cache", "caches/*"),
    "run": ("cache", "runs/*"),
    "stopped run": ("stopped", "runs/plain-*"),
    "study": ("study", STUDY),
}
"""What is damaged and verified, by name: the state of the world, and a pattern in it."""

NEEDED = ("teach", "resume", "report")
"""Tasks that start from those states."""

_UNREAD = ("*/lock", "*.lock", "*/report.html", "*/tables/*", "*/figures/*", "*/queue/runners/*")
_MADE_AGAIN = (*_UNREAD, "*/overlap/*", "*/queue/*")
_PARTS = ("data/*", "caches/*", "runs/*")
"""What a study has to have whole."""


def verify_damaged(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Damage one file of a thing, or remove a part of a study, and verify the thing."""
    state, pattern = _WHAT[name]
    prepare(world, [task for task in TASKS.values() if task.start == state])
    world.restore(state)
    thing = next(iter(sorted(world.place.glob(pattern))))
    arguments = ["verify", str(thing.relative_to(world.place))]
    kept = world.scratch / f"kept-{world.place.stat().st_ino}"
    intact = run(arguments, world.place)
    if intact.code:
        return Verdict(UNCLEAR, f"what nothing happened to: {intact.code} {intact.out[-300:]} {intact.err}")
    if name == "study" and dice.random() < 0.25:
        path = dice.choice(sorted(one for part in _PARTS for one in thing.glob(part) if one.is_dir()))
        words, due = f"loss of all of {path.relative_to(world.place)}", True
        away = path.rename(world.place / "away")
        found = run(arguments, world.place)
        away.rename(path)
    else:
        # What a killed command was writing is in nobody's way, and may be a state that is as good.
        files = sorted(one for one in thing.rglob("*") if one.is_file() and not one.name.startswith("."))
        path = dice.choice(files)
        damage = dice.choice(sorted(DAMAGES))
        words = f"{damage} of {path.relative_to(world.place)}"
        shutil.copyfile(path, kept)
        DAMAGES[damage](path, dice, [one for one in files if one.parent == path.parent])
        due = _must_be_named(path, kept)
        found = run(arguments, world.place)
        put_back(kept, path)
    if kind := broken(found):
        return Verdict(kind, f"{words}: {found.code} {found.err[-300:]}")
    if found.code not in (0, 1):
        return Verdict(TRACEBACK, f"{words}: {found.code} {found.complaint}")
    wrong = [line for line in found.out.splitlines() if line.startswith("wrong")]
    if due and not _named(path, wrong):
        return Verdict(UNCLEAR if found.code else SILENT, f"{words}: {wrong}")
    if run(arguments, world.place).out != intact.out:
        return Verdict(LOST, f"{words}: not intact when it was put back")
    return Verdict(RIGHT, f"{words}: {wrong}", error=bool(found.code))


def _must_be_named(path: Path, kept: Path) -> bool:
    """Whether a file is another one now, and somebody would read it or miss it."""
    if path.is_file() and path.read_bytes() == kept.read_bytes():
        return False
    unread = _UNREAD if path.exists() else _MADE_AGAIN
    return not any(fnmatch.fnmatch(str(path), pattern) for pattern in unread)


def _named(path: Path, lines: list[str]) -> bool:
    """Whether a line names a file, or the store, cache or checkpoint that is judged with all its files."""
    names = (path.name.removesuffix(".crc32"), f"{path.parent.name}:", f"{path.parent.parent.name}:")
    return any(name in line for line in lines for name in names)
