"""Measured speeds of finished runs, and schedules of runs that wait for each other."""

from __future__ import annotations

import heapq
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tutelage.study.plan import Plan, PlanRun

    Needs = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Timing:
    """A finished run.

    Attributes:
        shape: of the trained model.
        teacher: name of its teacher; None without one.
        flops: estimate of its training, teacher included.
        seconds: of training, over all sessions; of a cohort, its share.
    """

    shape: str
    teacher: str | None
    flops: float
    seconds: float


class Speeds:
    """FLOPs per second of a run: the median of finished runs like it.

    Those are runs of the same shape with the same teacher; without any, of the same shape; without any, all.
    """

    def __init__(self, timings: Sequence[Timing]) -> None:
        self._groups: dict[tuple[str | None, ...], list[float]] = defaultdict(list)
        for timing in timings:
            for key in _keys(timing.shape, timing.teacher):
                self._groups[key].append(timing.flops / timing.seconds)
        for group in self._groups.values():
            group.sort()

    def of(self, shape: str, teacher: str | None, *, without: float | None = None) -> float | None:
        """The speed, leaving out one run with the speed `without`; None if no other run is known."""
        for key in _keys(shape, teacher):
            group = self._groups.get(key, [])
            others = group
            if without is not None:
                place = group.index(without)
                others = group[:place] + group[place + 1 :]
            if others:
                return statistics.median(others)
        return None


def read_timings(directory: Path, plan: Plan) -> list[Timing]:
    """The finished runs of the study in `directory` that took measurable time."""
    found = []
    for run in plan.runs:
        state = RunDirectory(directory / "runs" / run.run).state()
        if state.get("status") != "done" or not state.get("seconds"):
            continue
        seconds = state["seconds"] / state.get("cohort", 1)
        found.append(Timing(*likeness(plan, run), run.flops, seconds))
    return found


def part_done(state: Mapping[str, Any]) -> float:
    """The fraction of its steps that a run has taken, as it last wrote in its state.json."""
    return float(state.get("step", 0) / max(1, state.get("steps", 1)))


def likeness(plan: Plan, run: PlanRun) -> tuple[str, str | None]:
    """The shape of a run and the teacher that runs beside it; runs with the same are alike in speed."""
    if run.student is None:
        return next(str(teacher.shape) for teacher in plan.teachers if teacher.name == run.teacher), None
    shape = next(student.shape for student in plan.students if student.name == run.student)
    return shape, run.teacher if run.kind == "student" else None


def estimate_error(timings: Sequence[Timing]) -> float | None:
    """Median of |actual / estimated - 1| of training time, each run estimated from the speed of the others.

    None with fewer than two runs.
    """
    speeds = Speeds(timings)
    errors = []
    for timing in timings:
        speed = speeds.of(timing.shape, timing.teacher, without=timing.flops / timing.seconds)
        if speed is not None:
            errors.append(abs(timing.seconds * speed / timing.flops - 1.0))
    return statistics.median(errors) if errors else None


def _keys(shape: str, teacher: str | None) -> list[tuple[str | None, ...]]:
    return [(shape, teacher), (shape,), ()]


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


def makespan(
    costs: Mapping[str, float], needs: Needs, devices: int, widths: Mapping[str, int] | None = None
) -> float:
    """When all is done on `devices`, heaviest chain first, which is the order in which a runner starts runs.

    Args:
        costs: by name, each after what it needs.
        needs: names of what must be finished first.
        devices: how many there are, at least as many as the widest piece of work takes.
        widths: devices that a piece of work takes at a time; default: one.
    """
    widths = widths or {}
    weights = chain_weights(costs, needs)
    followers: dict[str, list[str]] = {name: [] for name in costs}
    for name, before in needs.items():
        for need in before:
            followers[need].append(name)
    missing = {name: len(needs[name]) for name in costs}
    ready = [(-weights[name], name) for name in costs if not missing[name]]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now, free = 0.0, devices
    while ready or running:
        while ready and widths.get(ready[0][1], 1) <= free:
            name = heapq.heappop(ready)[1]
            free -= widths.get(name, 1)
            heapq.heappush(running, (now + costs[name], name))
        now, ended = heapq.heappop(running)
        free += widths.get(ended, 1)
        for name in followers[ended]:
            missing[name] -= 1
            if not missing[name]:
                heapq.heappush(ready, (-weights[name], name))
    return now
