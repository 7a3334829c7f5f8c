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

    from tutelage.objective import Gate
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
        gate: factor on alpha per token, or None.
        clip: largest global gradient norm.
        autocast: compute dtype when it is not float32.
    """

    body: nn.Module
    head: nn.Linear
    parameters: tuple[nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    objective: Objective
    teacher: Teacher | None
    gate: Gate | None
    clip: float
    autocast: torch.dtype | None

    def consults_teacher(self, alpha: float) -> bool:
        """Whether the teacher has any weight in a step with this alpha."""
        return self.teacher is not None and (alpha > 0 or self.objective.mixing == "keep_full_kd")


def loss_sums(trainee: Trainee, batch: Batch, alpha: float, listen: bool = False) -> LossSums:
    """The objective on one micro-batch, summed over its valid tokens.

    The teacher is run if it has any weight, or to `listen` to its cross-entropy.
    """
    device = batch.tokens_BT.device.type
    with torch.autocast(device, dtype=trainee.autocast, enabled=trainee.autocast is not None):
        consulted = trainee.teacher if listen or trainee.consults_teacher(alpha) else None
        targets = consulted.targets(batch) if consulted is not None else None
        hidden_BTD = trainee.body(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1)
    if trainee.autocast is not None:
        hidden_ND = hidden_ND.to(trainee.autocast)
    labels_N = batch.labels_BT.flatten()
    return chunked_objective(
        hidden_ND, trainee.head.weight, labels_N, targets, alpha, trainee.objective, trainee.gate
    )


def train_step(
    trainee: Trainee, micro_batches: Sequence[Batch], alpha: float, lr: float, listen: bool = False
) -> StepReport:
    """Update the student once from all micro-batches of all ranks; `listen` as in `loss_sums`.

    The number of valid tokens over micro-batches and ranks is the only denominator, so neither
    micro-batching nor the number of ranks changes the result beyond rounding.
    """
    valid = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    distributed.sum_([valid])
    totals = torch.zeros(5, device=valid.device)
    for batch in micro_batches:
        sums = loss_sums(trainee, batch, alpha, listen)
        (sums.loss / valid).backward()  # type: ignore[no-untyped-call]
        totals += torch.stack([sums.loss.detach(), sums.ce, sums.kd, sums.teacher_ce, sums.taught])
    gradients: list[Tensor] = [p.grad for p in trainee.parameters if p.grad is not None]
    counted = trainee.gate.sums() if trainee.gate is not None else []
    distributed.sum_([totals, *counted, *gradients])
    if trainee.gate is not None:
        trainee.gate.update()
    grad_norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, trainee.clip)
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    loss, ce, kd, teacher_ce, taught = (totals / valid).unbind()
    return StepReport(loss, ce, kd, teacher_ce, grad_norm, taught, lr)
