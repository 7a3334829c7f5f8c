"""One optimizer step: forward, chunked objective, backward, clip, update. Nothing waits for the device.

Several students can take a step together (a cohort): the teacher is asked once per micro-batch, and each
student computes what it would compute alone, operation for operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tutelage.data.hashing import mixed
from tutelage.objective import NotFiniteError, Objective, chunked_objective
from tutelage.objective.chunked import weight_and_bias
from tutelage.train import distributed
from tutelage.types import IGNORE_INDEX, Batch, LossSums, StepReport, Targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from tutelage.config.optim_config import OptimConfig
    from tutelage.objective import Gate
    from tutelage.teachers.live import Teacher


def adamw(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int, *, batch_tokens: int) -> float:
    """Learning rate of 0-based optimizer step `step` of `steps`, each of `batch_tokens`.

    Linear warm-up over the first `warmup` (steps or tokens), reaching the peak on its last step; then
    cosine down to `final_lr` of the peak on the last step, or constant, or (wsd) constant and a linear
    decay over the last `decay` of the steps, ending at `final_lr` of the peak. A `decay` of 0 is none.
    """
    warmup = config.warmup_steps(steps, batch_tokens)
    if step < warmup:
        return peak * (step + 1) / warmup
    low = config.final_lr * peak
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    start = config.decay_start(steps, batch_tokens)
    if step < start:
        return peak
    return peak + (low - peak) * (step - start + 1) / (steps - start)


@dataclass(frozen=True, slots=True)
class Trainee:
    """A student split at the hidden-state seam, with everything one step needs.

    Attributes:
        body: maps token ids to hidden states after the final norm.
        head: the output embedding, a linear layer with or without bias.
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


@dataclass(frozen=True, slots=True)
class Turn:
    """What one student does in one step.

    Attributes:
        trainee: the student.
        alpha: weight of the divergence.
        lr: learning rate.
        listen: ask the teacher even if it has no weight, for its cross-entropy.
        seed: of dropout, different for every run seed, step and rank.
    """

    trainee: Trainee
    alpha: float
    lr: float
    listen: bool = False
    seed: int = 0

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher has any weight in this step, or is listened to."""
        if self.trainee.teacher is None:
            return False
        return self.listen or self.alpha > 0 or self.trainee.objective.mixing == "keep_full_kd"


def loss_sums(trainee: Trainee, batch: Batch, targets: Targets | None, alpha: float) -> LossSums:
    """The objective on one micro-batch, summed over its valid tokens."""
    with _autocast(trainee, batch):
        hidden_BTD = trainee.body(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1)
    if trainee.autocast is not None:
        hidden_ND = hidden_ND.to(trainee.autocast)
    labels_N = batch.labels_BT.flatten()
    weight_VD, bias_V = weight_and_bias(trainee.head)
    return chunked_objective(
        hidden_ND, weight_VD, labels_N, targets, alpha, trainee.objective, trainee.gate, bias_V
    )


def teacher_targets(turns: Sequence[Turn], batch: Batch) -> Targets | None:
    """The targets of one micro-batch, computed once for all students; None if nobody asks."""
    for turn in turns:
        if turn.asks_teacher:
            assert turn.trainee.teacher is not None  # noqa: S101 - what asks_teacher says
            with _autocast(turn.trainee, batch):
                return turn.trainee.teacher.targets(batch)
    return None


def train_step(turns: Sequence[Turn], micro_batches: Sequence[Batch]) -> list[StepReport]:
    """Update every student once from all micro-batches of all ranks.

    The number of valid tokens over micro-batches and ranks is the only denominator, so neither
    micro-batching nor the number of ranks changes the result beyond rounding. Dropout is seeded per
    micro-batch and rank: a student that has it draws other masks in each, and the same ones whenever the step
    is taken again, alone, in a cohort or after a restart.

    Args:
        turns: the students, who share one teacher (or have none) and one compute dtype.
        micro_batches: of this rank.
    """
    valid = torch.stack([(batch.labels_BT != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    distributed.sum_([valid])
    totals = [torch.zeros(5, device=valid.device) for _ in turns]
    for number, batch in enumerate(micro_batches):
        targets = teacher_targets(turns, batch)
        for turn, total in zip(turns, totals, strict=True):
            torch.manual_seed(mixed(turn.seed, number))
            try:
                sums = loss_sums(turn.trainee, batch, targets if turn.asks_teacher else None, turn.alpha)
            except NotFiniteError as error:  # one student's damage is not the others'
                total.add_(_damage(error).to(total.device))
                continue
            (sums.loss / valid).backward()  # type: ignore[no-untyped-call]
            total.add_(torch.stack([sums.loss.detach(), sums.ce, sums.kd, sums.teacher_ce, sums.taught]))
    return [_update(turn, total, valid) for turn, total in zip(turns, totals, strict=True)]


def _damage(error: NotFiniteError) -> Tensor:
    """Sums that say the same as a GPU's, which looks at no inputs: not finite from where the damage is on."""
    of_teacher = error.name.startswith("targets")
    return torch.tensor([math.nan, 0.0 if of_teacher else math.nan, math.nan, math.nan, 0.0])


def _update(turn: Turn, totals: Tensor, valid: Tensor) -> StepReport:
    """Sum gradients over ranks, clip, step."""
    trainee = turn.trainee
    distributed.fill_gradients(trainee.parameters)
    gradients: list[Tensor] = [p.grad for p in trainee.parameters if p.grad is not None]
    counted = trainee.gate.sums() if trainee.gate is not None else []
    distributed.sum_([totals, *counted, *gradients])
    if trainee.gate is not None:
        trainee.gate.update()
    grad_norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, trainee.clip)
    for group in trainee.optimizer.param_groups:
        group["lr"] = turn.lr
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    loss, ce, kd, teacher_ce, taught = (totals / valid).unbind()
    return StepReport(loss, ce, kd, teacher_ce, grad_norm, taught, turn.lr)


def _autocast(trainee: Trainee, batch: Batch) -> torch.autocast:
    device = batch.tokens_BT.device.type
    return torch.autocast(device, dtype=trainee.autocast, enabled=trainee.autocast is not None)
