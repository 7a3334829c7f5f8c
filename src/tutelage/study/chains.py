"""Work that waits for other work: what the longest chain costs, and how long all takes on several devices."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Needs = Mapping[str, Sequence[str]]


def chain_weights(costs: Mapping[str, float], needs: Needs) -> dict[str, float]:
    """Cost of each piece of work and of the costliest chain of work that waits for it.

    Args:
        costs: by name, each after what it needs.
        needs: names of what must be finished first.
    """
    behind = dict.fromkeys(costs, 0.0)
    weights = {}
    for name in reversed(list(costs)):
        weights[name] = costs[name] + behind[name]
        for need in needs[name]:
            behind[need] = max(behind[need], weights[name])
    return weights


def critical_path(costs: Mapping[str, float], needs: Needs) -> list[str]:
    """The costliest chain, first to last: with any number of devices, all of it takes at least that long."""
    weights = chain_weights(costs, needs)
    path: list[str] = []
    waiting = list(costs)
    while waiting:
        path.append(max(waiting, key=weights.__getitem__))
        waiting = [name for name in costs if path[-1] in needs[name]]
    return path


def makespan(costs: Mapping[str, float], needs: Needs, devices: int) -> float:
    """When all is done on `devices`, each with one piece of work at a time, heaviest chain first.

    This is the order in which a runner starts runs.
    """
    weights = chain_weights(costs, needs)
    followers: dict[str, list[str]] = {name: [] for name in costs}
    for name, before in needs.items():
        for need in before:
            followers[need].append(name)
    missing = {name: len(needs[name]) for name in costs}
    ready = [(-weights[name], name) for name in costs if not missing[name]]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < devices:
            name = heapq.heappop(ready)[1]
            heapq.heappush(running, (now + costs[name], name))
        now, ended = heapq.heappop(running)
        for name in followers[ended]:
            missing[name] -= 1
            if not missing[name]:
                heapq.heappush(ready, (-weights[name], name))
    return now
