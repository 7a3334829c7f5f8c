"""The parts of the campaign: what is tried, how often, and by which function."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from campaigns.bad_inputs import stored, try_input
from campaigns.clocks import run_apart
from campaigns.corruptions import corrupt
from campaigns.cuts import cut
from campaigns.disks import fill
from campaigns.hostile import COUNTS, plant, plant_link
from campaigns.kills import kill_command, kill_study
from campaigns.verified import NEEDED, verify_damaged

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from campaigns.judging import Verdict
    from campaigns.world import World


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the campaign.

    Attributes:
        run: does one case, given the world, dice, the name of a group of cases and a number.
        many: number of cases by group.
        few: the same for a short campaign.
        mounts: it mounts disks, which only the system's administrator may.
        needs: tasks, besides those that groups are named after, in whose states it puts the world.
    """

    run: Callable[[World, random.Random, str, int], Verdict]
    many: dict[str, int]
    few: dict[str, int]
    mounts: bool = False
    needs: tuple[str, ...] = ()

    def possible(self) -> bool:
        """Whether it can be tried here."""
        return not self.mounts or os.geteuid() == 0


PARTS = {
    "kills": Part(
        kill_command,
        {"train": 30, "resume": 10, "taught": 10, "cached": 10, "cohort": 10, "ranks": 12, "teach": 15}
        | {"build": 8, "eval": 10, "report": 5},
        {"train": 2, "teach": 1, "ranks": 1},
    ),
    "study kills": Part(kill_study, {"study": 12}, {"study": 1}),
    "cuts": Part(
        cut,
        {"train": 20, "resume": 6, "taught": 4, "teach": 8, "build": 6, "eval": 6, "study": 12},
        {"train": 1, "teach": 1, "study": 1},
        mounts=True,
    ),
    "corruptions": Part(
        corrupt,
        {
            "train": 40,
            "resume": 60,
            "again": 60,
            "taught": 60,
            "cached": 50,
            "teach": 30,
            "teach on": 20,
            "eval": 60,
        }
        | {"study on": 12, "verdicts": 60},
        {"train": 4, "resume": 4, "again": 4},
    ),
    "verify": Part(
        verify_damaged,
        {"store": 30, "cache": 20, "run": 60, "stopped run": 30, "study": 120},
        {"store": 2, "cache": 1, "run": 3},
        needs=NEEDED,
    ),
    "disks": Part(
        fill,
        {"train": 16, "resume": 6, "taught": 6, "cohort": 4, "teach": 12, "build": 10, "eval": 8, "report": 4}
        | {"study": 4},
        {"train": 2, "teach": 1},
        mounts=True,
    ),
    "clocks": Part(run_apart, {"study": 5}, {}),
    "links": Part(plant_link, {"train": 24, "teach": 8, "report": 4}, {"train": 2}),
    "hostile": Part(plant, COUNTS, {"models": 2, "archives": 1}, needs=("report",)),
    "bad inputs": Part(try_input, {"stored": len(stored()), "drawn": 150}, {"stored": 20, "drawn": 10}),
}
"""The parts by name."""
