"""How a study stands, read from its directory while others may be working on it."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError
from tutelage.run_directory import RunDirectory
from tutelage.study.leases import Failures, Leases, ask_to_stop, is_gone, is_silent, living_runners, runners
from tutelage.study.plan import Plan, load_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tutelage.study.leases import Runner
    from tutelage.study.plan import Plan, PlanRun


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


_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Active:
    """A run that a runner works on: its budget, who, and what it last wrote of itself (state.json)."""

    run: str
    tokens: int
    where: str
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Status:
    """A study at this moment.

    Attributes:
        name: of the study.
        counts: runs by state: done, running, stopped, failed, waiting.
        active: the runs that go on.
        failed: runs that are given up, with the reason.
        retried: runs of which an attempt failed and that will be tried again.
        runners: host and process of each runner, and the time since its heartbeat; dead ones are named so.
        seconds_left: training time of all runs that are not done, one after the other, by measured speed;
            None before a run is done.
        timed: finished runs behind that speed.
        error: median relative error of a run's estimated training time; None before two runs are done.
    """

    name: str
    counts: dict[str, int]
    active: list[Active]
    failed: dict[str, str]
    retried: list[str]
    runners: list[str]
    seconds_left: float | None
    timed: int
    error: float | None


def read_status(directory: Path, retries: int = 1) -> Status:
    """The status of the study in `directory`.

    Raises:
        UserError: there is no valid plan.json.
    """
    plan = load_plan(directory)
    leases, failures = Leases(directory), Failures(directory, retries)
    leases.refresh()
    marked, attempted = failures.marked(), failures.attempted()
    counts: Counter[str] = Counter()
    active: list[Active] = []
    left: list[str] = []
    for run in plan.runs:
        state = RunDirectory(directory / plan.runs_directory / run.run).state()
        owner = leases.owner(run.run)
        if state.get("status") == "done":
            word = "done"
        elif owner is not None:
            word = "running"
            active.append(Active(run.run, run.tokens, owner, state))
        elif run.run in marked:
            word = "failed"
        else:
            word = "stopped" if state else "waiting"
        counts[word] += 1
        if word != "done":
            left.append(run.run)
    timings = read_timings(directory, plan)
    return Status(
        name=plan.name,
        counts=dict(counts),
        active=active,
        failed={run: reason for run, reason in marked.items() if run in left},
        retried=sorted((attempted - marked.keys()) & set(left)),
        runners=[_described(runner) for runner in runners(directory).values()],
        seconds_left=_seconds_left(plan, left, Speeds(timings)),
        timed=len(timings),
        error=estimate_error(timings),
    )


def stop_study(directory: Path, patience_seconds: float = 90.0) -> tuple[int, int]:
    """Ask every living runner of a study to checkpoint and end, and wait for them.

    Returns:
        How many were asked, and how many of them are still there.

    Raises:
        UserError: there is no valid plan.json.
    """
    load_plan(directory)
    asked = [*living_runners(directory)]
    for token in asked:
        ask_to_stop(directory, token)
    deadline = time.monotonic() + patience_seconds
    left = set(asked)
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left &= living_runners(directory).keys()
    return len(asked), len(left)


def retry_runs(directory: Path, names: Sequence[str]) -> list[str]:
    """Forget the failed attempts at `names`, or at all runs, so that runners try them again.

    Returns:
        The runs that had failed attempts.

    Raises:
        UserError: there is no valid plan.json, or a name is no run of it.
    """
    known = [run.run for run in load_plan(directory).runs]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{directory}: no run {unknown[0]} in its plan; `tutelage study status` names them")
    failures = Failures(directory, 0)
    return [run for run in names or known if failures.clear(run)]


def _seconds_left(plan: Plan, left: Sequence[str], speeds: Speeds) -> float | None:
    total = 0.0
    for run in plan.runs:
        if run.run in left:
            speed = speeds.of(*likeness(plan, run))
            if speed is None:
                return None
            total += run.flops / speed
    return total


def _described(runner: Runner) -> str:
    if is_gone(runner):
        return f"{runner.host} process {runner.pid}: dead"
    age = max(0.0, time.time() - runner.time)
    late = ": silent, dead unless its clock is off" if is_silent(runner) else ""
    return f"{runner.host} process {runner.pid}: heartbeat {age:.0f} s ago{late}"
