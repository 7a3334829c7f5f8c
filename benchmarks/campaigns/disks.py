"""Let the disk be full, out of files or read-only while a command runs, and give it room afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from campaigns.commands import run
from campaigns.judging import Verdict, judge
from campaigns.mounts import memory_disk, remount
from campaigns.world import TASKS, usage

if TYPE_CHECKING:
    import random

    from campaigns.world import World

_ROOM = "size=1g,nr_inodes=100k"


def fill(world: World, dice: random.Random, name: str, _: int) -> Verdict:
    """Run a command on a disk that is too small for it, and once more when it has room."""
    task = TASKS[name]
    truth = world.truth(task)
    what = dice.choice(["bytes", "bytes", "bytes", "files", "read-only"])
    with memory_disk(world.place):
        world.restore(task.start)
        taken, files = usage(world.place)
        room = {
            # Writing under another name needs room for a file twice.
            "bytes": f"size={taken + int(dice.random() ** 2 * 1.3 * truth.bytes) // 4096 * 4096 + 8192}",
            "files": f"nr_inodes={files + 2 + int(dice.random() * 1.3 * truth.files)}",
            "read-only": "ro",
        }[what]
        remount(world.place, room)
        outcome = run(world.arguments(task), world.place, ranks=task.ranks)
        return judge(
            world,
            task,
            outcome,
            f"disk with {room}, where {taken} bytes in {files} files are taken",
            names=("No space", "no space", "Read-only", "read-only", "full", "free are"),
            mend=lambda: remount(world.place, f"rw,{_ROOM}"),
        )
