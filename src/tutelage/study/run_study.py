"""Run a study: build its stores, write its plan, run its runs, ask them its tasks."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.files import lock_when_free, make_directory
from tutelage.processes import place
from tutelage.study.given_models import check_given_models
from tutelage.study.leases import Failures, Leases
from tutelage.study.nodes import begun_anew, bind, check_cells
from tutelage.study.plan import Plan, plan_of, save_plan
from tutelage.study.runner import run_all
from tutelage.study.side_tasks import Asker, build_stores
from tutelage.study.texts import check_texts

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    from tutelage.progress import Progress
    from tutelage.study.engines import Engine
    from tutelage.study.expand import ExpandedStudy

_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """Options of a runner, none of which changes results.

    Attributes:
        retries: further attempts at a run after one that failed without getting further; a runner that starts
            while no other is at work gives runs that have failed for good one more.
        cohort: largest number of students of one teacher and seed that train together.
    """

    retries: int = 1
    cohort: int = 1


def run_study(
    expanded: ExpandedStudy,
    directory: Path,
    engine: Engine,
    progress: Progress,
    options: RunnerOptions | None = None,
) -> None:
    """Build the stores, write the plan, run what is not finished yet, and ask all runs the study's tasks.

    Other runners of the study may do so beside this one.

    Args:
        expanded: what to run.
        directory: of the study, for data/, runs/, plan.json and queue/.
        engine: runs the tasks.
        progress: is told how all runs stand, and what is done between them.
        options: how it is run.

    Raises:
        UserError: input is wrong, some runs failed, or a runner works on another study in `directory`.
        Stopped: on Ctrl-C or `tutelage study stop`; the same call resumes.
    """
    options = options or RunnerOptions()
    if (size := place().size) > 1:
        raise UserError(
            f"this process is one of {size} (WORLD_SIZE), but a study itself starts the processes of its "
            "runs: start `tutelage study run` without torchrun; several of them share the study"
        )
    check_cells(expanded)
    make_directory(directory)
    with engine, Leases(directory) as leases:
        asker = Asker(expanded.study, directory, engine, leases, progress)
        with _preparation_lock(directory, leases, progress):
            asker.check()
            stores = build_stores(expanded, directory / "data", engine, leases, progress)
            nodes = bind(expanded, stores, directory / "runs", open_store(stores.corpus).vocab_size)
            given = check_given_models(node.config for node in nodes if not node.directory.is_done())
            for line in (*given, *check_texts(nodes), *begun_anew(nodes)):
                progress.note(line)
            _publish(directory, plan_of(expanded, nodes), leases)
            failures = _failures(directory, options.retries, leases, progress)
        run_all(nodes, engine, leases, failures, progress, options.cohort)
        asker.ask(nodes, stores.corpus)


def _preparation_lock(
    directory: Path, leases: Leases, progress: Progress
) -> contextlib.AbstractContextManager[None]:
    """Let one runner at a time prepare the study; the others wait, and then find it prepared."""
    waited = False

    def wait() -> bool:
        nonlocal waited
        if not waited:
            progress.note("another runner prepares the study")
        waited = True
        time.sleep(_POLL_SECONDS)
        return leases.is_asked_to_stop()

    return lock_when_free(directory / "lock", f"study {directory}", wait)


def _failures(directory: Path, retries: int, leases: Leases, progress: Progress) -> Failures:
    """The failed attempts; unless others are at work, each run that has failed gets one more."""
    failures = Failures(directory, retries)
    leases.refresh()
    if not leases.others_at_work() and (again := failures.forgive()):
        progress.note(f"failed before, and tried again: {', '.join(again)}")
    return failures


def _publish(directory: Path, plan: Plan, leases: Leases) -> None:
    """Write plan.json, unless a live runner works on another plan.

    Runners that wait to prepare the study work on none yet: the same command may have been started twice.
    """
    ours = digest(plan.model_dump(mode="json"))
    for runner in leases.others().values():
        if runner.plan not in (None, ours):
            raise UserError(
                f"{directory}: process {runner.pid} on {runner.host} runs another plan there; stop it "
                f"with `tutelage study stop {shlex.quote(str(directory))}`, or give another --output"
            )
    save_plan(directory, plan)
    leases.work_on(ours)
