"""The loop around the step: one run, or several that read the same batches together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tutelage.config.teacher_config import CacheTeacher
from tutelage.errors import Stopped, UserError
from tutelage.files import stop_signal
from tutelage.teachers.cache.reader import check_serves
from tutelage.train import distributed
from tutelage.train.step import train_step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.train.setup import Setup
    from tutelage.train.student import Session
    from tutelage.types import Batch


def check_cohort(configs: Sequence[RunConfig]) -> None:
    """Check that runs can train together, and that their teacher's targets serve each of them.

    Raises:
        UserError: naming the first field that they must share and do not, or what one asks for in vain.
    """
    first = configs[0]
    for other in configs[1:]:
        for field, ours, theirs in (
            ("data", first.data, other.data),
            ("global_batch_tokens", first.global_batch_tokens, other.global_batch_tokens),
            ("micro_batch_tokens", first.micro_batch_tokens, other.micro_batch_tokens),
            ("dtype", first.dtype, other.dtype),
            ("runtime.device", first.runtime.device, other.runtime.device),
            ("runtime.threads", first.runtime.threads, other.runtime.threads),
            ("output", first.output, other.output),
        ):
            if ours != theirs:
                raise UserError(
                    f"runs {first.name} and {other.name}: trained together, they read the same batches, but "
                    f"{field} is {ours} in one and {theirs} in the other; make them equal or train one by one"
                )
    teachers = [config.teacher for config in configs if config.teacher is not None]
    for teacher in teachers[1:]:
        if teacher != teachers[0]:
            raise UserError(
                f"teacher: runs trained together share one, but there are {teachers[0]} and {teacher}; "
                "train them in one cohort per teacher"
            )
    for config in configs:
        if isinstance(config.teacher, CacheTeacher):
            check_serves(config.teacher.path, config.objective)


class Watcher(Protocol):
    """Whoever looks on while a run trains: a progress bar, a tracker, nobody."""

    def begin(self, run: str, step: int, steps: int) -> None:
        """The run starts (or goes on) after `step` of `steps` optimizer steps."""

    def advance(self, step: int) -> None:
        """`step` steps are done. Called at every step, so it must be cheap."""

    def log(self, row: Mapping[str, float]) -> None:
        """A row of metrics.jsonl was written."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Nobody:
    """The watcher of a run that nobody looks at."""

    def begin(self, run: str, step: int, steps: int) -> None:
        """Do nothing."""

    def advance(self, step: int) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, float]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def train(sessions: Sequence[Session], watcher: Watcher) -> list[UserError]:  # noqa: C901 - one loop, read whole
    """Train every run to the end of its budget and write its model directory.

    The runs read the same batches and share one teacher, which is asked once for all of them. A run whose
    loss breaks is marked as failed and left out; the others go on.

    Returns:
        What was wrong with the runs that were left out: a loss that is not finite, or a directory that
        cannot be written.

    Raises:
        Stopped: on SIGINT or SIGTERM, after writing a checkpoint of every run.
    """
    setup = sessions[0].setup
    is_main = setup.world.is_main
    first, last = min(s.step for s in sessions), max(s.setup.steps for s in sessions)
    if is_main:
        name = sessions[0].directory.id if len(sessions) == 1 else f"{len(sessions)} runs"
        watcher.begin(name, first, last)
    teacher = next((s.setup.trainee.teacher for s in sessions if s.setup.trainee.teacher), None)
    errors: list[UserError] = []
    upcoming = _micro_batches(setup, first)
    with stop_signal() as stop:
        for step in range(first, last):
            batches, upcoming = upcoming, _micro_batches(setup, step + 1)
            if teacher is not None:
                teacher.prefetch(upcoming)
            due = [session for session in sessions if session.is_due(step)]
            for session in due:
                session.between_steps()
            turns = [session.turn() for session in due]
            reports = train_step(turns, batches)
            if is_main:
                watcher.advance(step + 1)
            stopping = distributed.anywhere(stop.is_set(), setup.device)
            for session, turn, report in zip(due, turns, reports, strict=True):
                try:
                    session.after(turn, report, stopping=stopping)
                except UserError as error:
                    session.give_up(error)
                    errors.append(error)
            if is_main and due and due[0].row.get("step") == step + 1:
                watcher.log(due[0].row)
            left = [session for session in sessions if session.is_due(session.step)]
            if stopping and left:
                raise Stopped
            if not left:
                break
    distributed.barrier()
    return errors


def _micro_batches(setup: Setup, step: int) -> list[Batch]:
    whole = setup.loader.batch(step).to(setup.device)
    size = setup.micro_sequences
    return [whole.rows(slice(start, start + size)) for start in range(0, len(whole.starts), size)]
