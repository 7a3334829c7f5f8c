"""One optimizer step: forward, chunked objective, backward, clip, update. Nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tutelage.objective import Objective, chunked_objective
from tutelage.train import distributed
from tutelage.types import IGNORE_INDEX, Batch, LossSums, StepReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from tutelage.teachers.base import Teacher


@dataclass(frozen=True, slots=True)
class Trainee:
    """A student split at the hidden-state seam, with everything one step needs.

    Attributes:
        body: maps token ids to hidden states after the final norm.
        head: the output embedding, a bias-free linear layer.
        parameters: what the optimizer updates.
        optimizer: AdamW.
        objective: divergence and temperature.
        teacher: None for plain cross-entropy.
        clip: largest global gradient norm.
        autocast: compute dtype when it is not float32.
    """

    body: nn.Module
    head: nn.Linear
    parameters: tuple[nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    objective: Objective
    teacher: Teacher | None
    clip: float
    autocast: torch.dtype | None


def loss_sums(trainee: Trainee, batch: Batch, alpha: float) -> LossSums:
    """The objective on one micro-batch, summed over its valid tokens."""
    device = batch.tokens_BT.device.type
    with torch.autocast(device, dtype=trainee.autocast, enabled=trainee.autocast is not None):
        targets = trainee.teacher.targets(batch) if trainee.teacher is not None and alpha > 0 else None
        hidden_BTD = trainee.body(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1)
    if trainee.autocast is not None:
        hidden_ND = hidden_ND.to(trainee.autocast)
    labels_N = batch.labels_BT.flatten()
    return chunked_objective(hidden_ND, trainee.head.weight, labels_N, targets, alpha, trainee.objective)


def train_step(trainee: Trainee, micro_batches: Sequence[Batch], alpha: float, lr: float) -> StepReport:
    """Update the student once from all micro-batches of all ranks.

    The number of valid tokens over micro-batches and ranks is the only denominator, so neither
    micro-batching nor the number of ranks changes the result beyond rounding.
    """
    valid = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    distributed.sum_([valid])
    totals = torch.zeros(4, device=valid.device)
    for batch in micro_batches:
        sums = loss_sums(trainee, batch, alpha)
        (sums.loss / valid).backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([sums.loss.detach(), sums.ce, sums.kd, sums.teacher_ce])
    gradients: list[Tensor] = [p.grad for p in trainee.parameters if p.grad is not None]
    distributed.sum_([totals, *gradients])
    grad_norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, trainee.clip)
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    loss, ce, kd, teacher_ce = (totals / valid).unbind()
    return StepReport(loss, ce, kd, teacher_ce, grad_norm, alpha, lr)
