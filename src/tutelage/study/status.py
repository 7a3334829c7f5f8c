"""Read the state of a study from its directory while runners may be working on it; stop and retry runs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError
from tutelage.run_directory import RunDirectory
from tutelage.study.leases import Failures, Leases, ask_to_stop, is_gone, is_silent, living_runners, runners
from tutelage.study.plan import load_plan
from tutelage.study.timings import Speeds, estimate_error, likeness, part_done, read_timings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tutelage.study.leases import Runner
    from tutelage.study.plan import Plan


_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Active:
    """A run that a runner works on: budget, runner, and contents of its state.json."""

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
        active: the runs that runners work on.
        failed: runs that failed for good, with the reason.
        retried: runs of which an attempt failed and that will be tried again.
        runners: host and process of each runner, and the time since its heartbeat; dead ones are named so, as
            long as nobody has taken over what they held.
        at_work: whether one of them seems to live, if only between two runs.
        seconds_left: training time of what runs that are not done still have to do, one after the other, by
            measured speed; None before a run is done.
        not_planned: runs that are there and not in the plan, which was another when they were made, or is one
            of a part of the study.
        timed: finished runs behind that speed.
        error: median relative error of a run's estimated training time; None before two runs are done.
    """

    name: str
    counts: dict[str, int]
    active: list[Active]
    failed: dict[str, str]
    retried: list[str]
    runners: list[str]
    at_work: bool
    seconds_left: float | None
    not_planned: list[str]
    timed: int
    error: float | None


def read_status(directory: Path) -> Status:
    """Read the status of the study in `directory`.

    Raises:
        UserError: there is no valid plan.json.
    """
    plan = load_plan(directory)
    leases, failures = Leases(directory), Failures(directory, retries=1)  # unless a runner was told otherwise
    leases.refresh()
    marked, attempted = failures.marked(), failures.attempted()
    counts: Counter[str] = Counter()
    active: list[Active] = []
    left: dict[str, float] = {}
    for run in plan.runs:
        place = RunDirectory(directory / "runs" / run.run)
        state = place.state()
        owner = leases.owner(run.run)
        standing = place.status()
        if standing == "done":
            word = "done"
        elif owner is not None:
            word = "running"
            active.append(Active(run.run, run.tokens, owner, state))
        elif run.run in marked:
            word = "failed"
        else:
            word = "waiting" if standing == "not started" else "stopped"
        counts[word] += 1
        if word != "done":
            left[run.run] = run.flops * (1 - part_done(state))
    timings = read_timings(directory, plan)
    holders = {leases.holder(run) for run in left}
    return Status(
        name=plan.name,
        counts=dict(counts),
        active=active,
        failed={run: reason for run, reason in marked.items() if run in left},
        retried=sorted((attempted - marked.keys()) & left.keys()),
        runners=[
            _described(runner)
            for token, runner in runners(directory).items()
            if token in holders or not is_gone(runner)
        ],
        at_work=not all(is_silent(runner) for runner in living_runners(directory).values()),
        seconds_left=_seconds_left(plan, left, Speeds(timings)),
        not_planned=_not_planned(directory / "runs", plan),
        timed=len(timings),
        error=estimate_error(timings),
    )


def stop_study(
    directory: Path,
    patience_seconds: float = 90.0,
    tell: Callable[[Sequence[Runner], float], None] = lambda *_: None,
) -> tuple[int, int]:
    """Ask every living runner of a study to checkpoint and end, and wait for them.

    Args:
        directory: of the study.
        patience_seconds: how long they are waited for.
        tell: is called with those that were asked and with that time, before they are waited for.

    Returns:
        How many were asked, and how many of them have not ended.

    Raises:
        UserError: there is no valid plan.json.
    """
    load_plan(directory)
    asked = living_runners(directory)
    for token in asked:
        ask_to_stop(directory, token)
    if asked:
        tell([*asked.values()], patience_seconds)
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


def _not_planned(runs: Path, plan: Plan) -> list[str]:
    """Names of the runs in a directory that a plan does not have."""
    planned = {run.run for run in plan.runs}
    others = sorted(path for path in runs.glob("*/") if path.name not in planned)
    return [path.name for path in others if RunDirectory(path).status() != "not started"]


def _seconds_left(plan: Plan, left: Mapping[str, float], speeds: Speeds) -> float | None:
    """`left` has the FLOPs that runs still have to do."""
    total = 0.0
    for run in plan.runs:
        if run.run in left:
            speed = speeds.of(*likeness(plan, run))
            if speed is None:
                return None
            total += left[run.run] / speed
    return total


def _described(runner: Runner) -> str:
    if is_gone(runner):
        return f"{runner.host} process {runner.pid}: dead"
    age = max(0.0, time.time() - runner.time)
    late = ": silent, dead unless its clock is off" if is_silent(runner) else ""
    return f"{runner.host} process {runner.pid}: heartbeat {age:.0f} s ago{late}"
