"""One optimizer step: forward, chunked objective, backward, clip, update. Nothing waits for the device.

Several students can take a step together (a cohort): the teacher is asked once per micro-batch, and each
student computes what it would compute alone, operation for operation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.data.hashing import mixed, uniforms
from tutelage.train import distributed
from tutelage.train.optim import update
from tutelage.train.parallel import begin_micro_batch
from tutelage.train.stopwatch import BACKWARD, OPTIMIZER, TEACHER, Stopwatch
from tutelage.types import IGNORE_INDEX, LossSums, StepReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tutelage.train.student import StepInputs, Student
    from tutelage.types import Batch, Targets


_GATE_STREAM = 3
"""Number of the draws of a random gate, among those of the samplers."""


def loss_sums(student: Student, batch: Batch, targets: Targets | None, alpha: float) -> LossSums:
    """The objective on one micro-batch, summed over its valid tokens."""
    if student.gate is not None:
        student.gate.begin(partial(_draws, batch, student.config.data.seed))
    return LossSums(*student.module(batch, targets, alpha, student.gate))


def _draws(batch: Batch, seed: int) -> Tensor:
    """A uniform number for each token, by its place in the split."""
    length = batch.tokens_BT.shape[1]
    places_N = np.add.outer(np.array(batch.starts), np.arange(length)).ravel()
    draws_N = torch.from_numpy(uniforms(seed, _GATE_STREAM, places_N, 1)[:, 0]).float()
    return draws_N.to(batch.tokens_BT.device)


def teacher_targets(inputs: Sequence[StepInputs], batch: Batch) -> Targets | None:
    """Compute the targets of one micro-batch once for all students; None if none of them needs any."""
    for one in inputs:
        if one.needs_teacher:
            assert one.student.teacher is not None  # noqa: S101 - what needs_teacher says
            return one.student.teacher.targets(batch)
    return None


def train_step(
    inputs: Sequence[StepInputs], micro_batches: Sequence[Batch], watch: Stopwatch | None = None
) -> list[StepReport]:
    """Update every student once from all micro-batches of all ranks.

    The number of valid tokens over micro-batches and ranks is the only denominator, so neither
    micro-batching nor the number of ranks changes the result beyond rounding. Dropout is seeded per
    micro-batch and rank: a student that has it draws other masks in each, and the same ones whenever the step
    is taken again, alone, in a cohort or after a restart.

    Args:
        inputs: one per student; they share one teacher (or have none) and one compute dtype.
        micro_batches: of this rank.
        watch: takes the times of the step's parts.
    """
    watch = watch or Stopwatch(micro_batches[0].tokens_BT.device, running=False)
    valid = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    distributed.sum_([valid])
    totals = [torch.zeros(5, device=valid.device) for _ in inputs]
    watch.lap("start")
    with watch.follow(one.student.module.head for one in inputs):
        for number, batch in enumerate(micro_batches):
            targets = teacher_targets(inputs, batch)
            watch.lap(TEACHER)
            for owner, (one, total) in enumerate(zip(inputs, totals, strict=True)):
                begin_micro_batch(one.student, last=number == len(micro_batches) - 1)
                _seed_dropout(mixed(one.seed, number), batch.tokens_BT.device)
                sums = loss_sums(one.student, batch, targets if one.needs_teacher else None, one.alpha)
                sums.loss.backward()  # type: ignore[no-untyped-call]
                metrics = sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha
                total.add_(torch.stack([sums.loss.detach(), *metrics]))
                watch.lap(BACKWARD, owner)
    for one in inputs:
        if one.student.teacher is not None:
            one.student.teacher.release()
    reports = []
    for owner, (one, total) in enumerate(zip(inputs, totals, strict=True)):
        reports.append(_update(one, total, valid))
        watch.lap(OPTIMIZER, owner)
    return reports


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generators of a student as `torch.manual_seed` does, which costs a thousand times as much.

    It keeps a formatted stack for each kind of device that this process does not use.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _update(inputs: StepInputs, totals: Tensor, valid: Tensor) -> StepReport:
    """Sum losses over ranks, then update the student unless something is not finite."""
    student = inputs.student
    own_loss = totals[0].clone()
    gate_sums = student.gate.sums() if student.gate is not None else []
    distributed.sum_([totals, *gate_sums])
    loss, ce, kd, teacher_ce, alpha = (totals / valid).unbind()
    check = partial(student.guard.check, loss, ce, own_loss)
    settings = inputs.lr, student.config.optim.clip
    grad_norm = update(student.optimizer, student.parameters, *settings, valid.float(), check)
    if student.gate is not None:
        student.gate.update(student.guard.skipped)
    return StepReport(loss, ce, kd, teacher_ce, grad_norm, alpha, inputs.lr)
