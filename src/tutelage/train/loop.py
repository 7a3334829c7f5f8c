"""The loop around the training step, for one run or a cohort of runs that read the same batches."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from tutelage.errors import Stopped
from tutelage.files import stop_signal
from tutelage.progress import NullProgress, Progress
from tutelage.train import distributed
from tutelage.train.batches import BatchesAhead
from tutelage.train.step import train_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.train.student import Student


def train(students: Sequence[Student], progress: Progress, evaluate: Callable[[Student], None]) -> None:
    """Train every student to the end of its budget.

    The students read the same batches and share one teacher, whose targets are computed once for all of them.
    One that fails, because its loss is not finite for example, is left out; the others continue.

    Args:
        students: resumed from their checkpoints.
        progress: is told every step.
        evaluate: called with a student every `eval.every` tokens, on all processes.

    Raises:
        Stopped: on SIGINT or SIGTERM, after writing a checkpoint of every student.
    """
    lead = students[0]
    progress = progress if lead.world.is_main else NullProgress()
    first, last = min(s.step for s in students), max(s.steps for s in students)
    stage = lead.directory.id if len(students) == 1 else f"{len(students)} runs"
    if first:
        progress.note(f"resuming after step {first:,} of {last:,}")
    progress.start(stage, last, "steps", first)
    teacher = next((s.teacher for s in students if s.teacher is not None), None)
    with stop_signal() as stop, _batches(lead, first) as ahead:
        upcoming = ahead.next_step()
        for step in range(first, last):
            batches, upcoming = upcoming, ahead.next_step()
            if teacher is not None:
                teacher.prefetch(upcoming)
            # One whose checkpoint is further along waits for the others.
            due = [student for student in students if student.has_steps_left and student.step == step]
            for student in due:
                student.maybe_evaluate(evaluate)
            inputs = [student.step_inputs() for student in due]
            reports = train_step(inputs, batches)
            progress.advance(stage, step + 1)
            broken = any(student.checkpoints.has_failed for student in due)
            stopping = distributed.anywhere(stop.is_set() or broken, lead.world.device)
            rows = [
                one.student.finish_step(one, report, stopping=stopping)
                for one, report in zip(inputs, reports, strict=True)
            ]
            if rows and rows[0] is not None:
                progress.describe(stage, rows[0])
            for warning in chain.from_iterable(student.take_warnings() for student in due):
                progress.note(f"warning: {warning}")
            left = any(student.has_steps_left for student in students)
            if stopping and left and distributed.anywhere(stop.is_set(), lead.world.device):
                raise Stopped
            if not left:
                break
    progress.finish(stage)


def _batches(student: Student, first: int) -> BatchesAhead:
    """The batches of this rank, which all students of a cohort read."""
    config = student.config
    piece = (config.micro_batch_tokens or config.global_batch_tokens) // config.data.sequence_length
    return BatchesAhead(student.loader, first, piece, student.world.device)
