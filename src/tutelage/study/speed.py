"""How fast the finished runs of a study were, and what that says of estimates made from FLOPs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.train.rundir import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tutelage.study.planfile import Plan, PlanRun


@dataclass(frozen=True, slots=True)
class Timing:
    """A finished run.

    Attributes:
        rung: shape of the trained model.
        teacher: name of its teacher; None without one.
        flops: estimate of its training, teacher included.
        seconds: of training, over all sessions; of a cohort, its share.
    """

    rung: str
    teacher: str | None
    flops: float
    seconds: float


class Speeds:
    """FLOPs per second of runs like a given one: the median of the most alike.

    Alike are first runs of the same shape with the same teacher, then of the same shape, then all.
    """

    def __init__(self, timings: Sequence[Timing]) -> None:
        self._groups: dict[tuple[str | None, ...], list[float]] = defaultdict(list)
        for timing in timings:
            for key in _keys(timing.rung, timing.teacher):
                self._groups[key].append(timing.flops / timing.seconds)
        for group in self._groups.values():
            group.sort()

    def of(self, rung: str, teacher: str | None, *, without: float | None = None) -> float | None:
        """The speed, leaving out one run with the speed `without`; None if no other run is known."""
        for key in _keys(rung, teacher):
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
        state = RunDirectory(directory / plan.runs_directory / run.run).state()
        if state.get("status") != "done" or not state.get("seconds"):
            continue
        seconds = state["seconds"] / state.get("cohort", 1)
        found.append(Timing(*likeness(plan, run), run.flops, seconds))
    return found


def likeness(plan: Plan, run: PlanRun) -> tuple[str, str | None]:
    """What makes runs alike in speed: the shape, and the teacher that runs beside it."""
    if run.student is None:
        return next(str(teacher.rung) for teacher in plan.teachers if teacher.name == run.teacher), None
    rung = next(student.rung for student in plan.students if student.name == run.student)
    return rung, run.teacher if run.kind == "student" else None


def estimate_error(timings: Sequence[Timing]) -> float | None:
    """Median of |actual / estimated - 1| of training time, each run estimated from the speed of the others.

    None with fewer than two runs.
    """
    errors = list(_errors(timings))
    return statistics.median(errors) if errors else None


def _errors(timings: Sequence[Timing]) -> Iterator[float]:
    speeds = Speeds(timings)
    for timing in timings:
        speed = speeds.of(timing.rung, timing.teacher, without=timing.flops / timing.seconds)
        if speed is not None:
            yield abs(timing.seconds * speed / timing.flops - 1.0)


def _keys(rung: str, teacher: str | None) -> list[tuple[str | None, ...]]:
    return [(rung, teacher), (rung,), ()]
