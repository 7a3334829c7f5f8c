"""The loop around the training step, for one run or a cohort of runs that read the same batches.

A thread reads the tokens of the next step while this one is computed. Where the memory of a device is not
enough, one line says what was in it.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Self

import torch
from torch.distributed.tensor import DTensor

from tutelage.errors import Stopped, UserError
from tutelage.progress import NullProgress, Progress
from tutelage.stopping import stop_signal
from tutelage.train import distributed
from tutelage.train.metrics import peak_memory
from tutelage.train.step import train_step
from tutelage.train.stopwatch import Stopwatch, profiled

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from tutelage.data.loader import Loader
    from tutelage.train.student import Student
    from tutelage.types import Batch


def train(students: Sequence[Student], progress: Progress, evaluate: Callable[[Student], None]) -> None:
    """Train every student to the end of its budget.

    The students read the same batches and share one teacher, whose targets are computed once for all of them.
    One that fails, because its loss is not finite for example, is left out; the others continue.

    Args:
        students: resumed from their checkpoints.
        progress: is told every step.
        evaluate: called with a student every `eval.every` tokens, on all processes.

    Raises:
        Stopped: on a signal to stop, after writing a checkpoint of every student.
    """
    lead = students[0]
    progress = progress if lead.world.is_main else NullProgress()
    last = max(s.steps for s in students)
    first = min((s.step for s in students if s.has_steps_left), default=last)
    stage = lead.directory.id if len(students) == 1 else f"{len(students)} runs"
    if first:
        progress.note(f"resuming after step {first:,} of {last:,}")
    progress.start(stage, last, "steps", first)
    teacher = next((s.teacher for s in students if s.teacher is not None), None)
    runtime = lead.config.runtime
    place = lead.directory.path / "profile"
    with (
        memory_errors_named(students),
        stop_signal() as stop,
        _batches(lead, first) as ahead,
        profiled(runtime.profile, last - first, place, lead.world, progress) as step_profiler,
    ):
        upcoming = ahead.next_step()
        for step in range(first, last):
            batches, upcoming = upcoming, ahead.next_step()
            later = step + 1
            asked = any(later < s.steps and s.step_inputs(later).needs_teacher for s in students)
            if teacher is not None and asked:
                teacher.prefetch(upcoming)
            # One whose checkpoint is further along waits for the others.
            due = [student for student in students if student.has_steps_left and student.step == step]
            with _not_timed(students):
                for student in due:
                    student.maybe_evaluate(evaluate)
            taken = partial(progress.advance, stage, step + 1)
            with _not_timed([student for student in students if student not in due]):
                row, stopping = _take_step(due, batches, ahead.waited, stop, taken)
            step_profiler()
            if row is not None:
                progress.describe(stage, row)
            for warning in chain.from_iterable(student.take_warnings() for student in due):
                progress.note(f"warning: {warning}")
            left = any(student.has_steps_left for student in students)
            if stopping and distributed.anywhere(stop.is_set()):
                raise Stopped(f"after step {step + 1:,} of {last:,}")
            if not left:
                break
    progress.finish(stage, "failed" if all(student.error for student in students) else "done")


@contextlib.contextmanager
def _not_timed(students: Sequence[Student]) -> Iterator[None]:
    """Do not count the time of the block, in which these students wait, as their training time."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    for student in students:
        student.log.meter.pause(seconds)


def _take_step(
    due: Sequence[Student],
    batches: Sequence[Batch],
    waited: float,
    stop: threading.Event,
    taken: Callable[[], None],
) -> tuple[dict[str, float] | None, bool]:
    """Let students take a step, and log and save it where that is due.

    Args:
        due: the students.
        batches: micro-batches of this rank.
        waited: seconds that passed until they were there.
        stop: set if the run is to end after this step.
        taken: called when the step is taken.

    Returns:
        The first student's row of metrics.jsonl, if it wrote one; whether all are stopping.
    """
    inputs = [student.step_inputs(student.step) for student in due]
    watch = Stopwatch(batches[0].tokens_BT.device, running=any(student.logs_next for student in due))
    reports = train_step(inputs, batches, watch)
    taken()
    broken = any(student.checkpoints.has_failed for student in due)
    stopping = distributed.anywhere(stop.is_set() or broken)
    rows = []
    for number, (one, report) in enumerate(zip(inputs, reports, strict=True)):
        one.student.log.meter.wait(waited)
        parts = partial(watch.seconds, number)
        rows.append(one.student.finish_step(one, report, stopping=stopping, parts=parts))
    return (rows[0] if rows else None), stopping


def _batches(student: Student, first: int) -> BatchesAhead:
    """The batches of this rank, which all students of a cohort read."""
    config = student.config
    piece = (config.micro_batch_tokens or config.global_batch_tokens) // config.data.sequence_length
    return BatchesAhead(student.loader, first, piece, student.world.device)


class BatchesAhead:
    """The batches of consecutive steps on one rank, in pieces of one forward pass each.

    A batch is a function of its step, so nothing has to be kept for a resumed run, and what was made ahead in
    vain is dropped. For CUDA, batches are made in page-locked memory and copied without waiting.

    Args:
        loader: batches by step.
        first: the first step.
        piece: sequences of one forward pass.
        device: where batches are wanted.

    Attributes:
        waited: seconds the last `next_step` waited for its batch.
    """

    def __init__(self, loader: Loader, first: int, piece: int, device: torch.device) -> None:
        self._loader = loader
        self._piece = piece
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._step = first
        self._coming: Future[Batch] = self._thread.submit(self._batch, first)
        self.waited = 0.0

    def __enter__(self) -> Self:
        """Return the batches themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, which finishes the batch it is at."""
        self._thread.shutdown(cancel_futures=True)

    def next_step(self) -> list[Batch]:
        """Return the micro-batches of the next step, and have those of the step after it made.

        Raises:
            Exception: whatever went wrong where the batch was made.
        """
        began = time.perf_counter()
        batch = self._coming.result()
        self.waited = time.perf_counter() - began
        self._step += 1
        self._coming = self._thread.submit(self._batch, self._step)
        batch = batch.to(self._device)
        starts = range(0, len(batch.starts), self._piece)
        return [batch.rows(slice(start, start + self._piece)) for start in starts]

    def _batch(self, step: int) -> Batch:
        batch = self._loader.batch(step)
        return batch.pinned() if self._device.type == "cuda" else batch


_SIGNS = ("out of memory", "not enough memory", "can't allocate memory")
"""Of the messages of torch's allocators, which are plain RuntimeErrors on the CPU."""


class LackOfMemoryError(UserError):
    """The memory of a device was not enough; whoever knows the run's plan adds what to turn."""


@contextlib.contextmanager
def memory_errors_named(students: Sequence[Student]) -> Iterator[None]:
    """Raise a failed allocation in the block as a `LackOfMemoryError` about the run of `students`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise LackOfMemoryError(_explained(students)) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


def _explained(students: Sequence[Student]) -> str:
    """What is known to be in memory."""
    lead = students[0]
    device = lead.world.device
    parameters = [parameter for student in students for parameter in student.model.parameters()]
    parts = {
        "weights": _size(parameters),
        "gradients": _size(p.grad for p in parameters if p.grad is not None),
        "moments": _size(t for s in students for state in s.optimizer.state.values() for t in state.values()),
    }
    held = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    most = f"{_gb(peak_memory(device))} at most"
    if device.type == "cuda":
        most += f" of {_gb(torch.cuda.get_device_properties(device).total_memory)}"
    many = f"; {len(students)} students train together, fewer take less" if len(students) > 1 else ""
    return (
        f"{lead.directory.path}: step {lead.step + 1}: out of memory on {device}: {most}, of which {held}; "
        f"the rest is activations, logits and teacher{many}"
    )


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of `tensors`."""
    held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in held)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
