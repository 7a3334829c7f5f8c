"""The production objective: head, loss and gradient per chunk of tokens, never holding [N, V].

Within a chunk the gradient with respect to the student's logits is written down rather than found by
autograd. With forward KL at T=1 the whole objective is cross-entropy against the mixture
q = (1 - alpha) onehot + alpha p_teacher, whose logit gradient is softmax(s) - q: one softmax, one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.objective.divergences import DIVERGENCES
from tutelage.objective.objective import Objective, check_inputs
from tutelage.types import IGNORE_INDEX, DenseTargets, LossSums

CHUNK_BYTES = 16 * 2**20
"""Default size of one [chunk, V] float32 buffer; a handful of them exist at a time."""


def default_chunk_tokens(vocab_size: int) -> int:
    """Tokens per chunk so that one float32 logit buffer takes about `CHUNK_BYTES`."""
    return max(16, CHUNK_BYTES // (4 * vocab_size))


def chunked_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: DenseTargets | None,
    alpha: float,
    objective: Objective,
) -> LossSums:
    """Same arguments, value, gradient and errors as `reference_objective`, in a few chunks of memory.

    Gradients for `hidden_ND` and `weight_VD` are computed during the forward pass and scaled in the
    backward pass. Logits are float32 whatever the dtype of the hidden states; the weight's gradient is
    accumulated in float32.
    """
    check_inputs(hidden_ND, weight_VD, labels_N, targets, alpha)
    plan = _Plan(labels_N, targets, alpha, objective, torch.is_grad_enabled())
    loss, ce, kd, teacher_ce = _ChunkedObjective.apply(hidden_ND, weight_VD, plan)  # type: ignore[no-untyped-call]
    return LossSums(loss, ce, kd, teacher_ce)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the autograd function needs beside the two differentiable tensors."""

    labels_N: Tensor
    targets: DenseTargets | None
    alpha: float
    objective: Objective
    wants_gradient: bool


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch hands over an object of its own
        hidden_ND: Tensor,
        weight_VD: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight = weight_VD.to(hidden_ND.dtype)
        wants_hidden = plan.wants_gradient and hidden_ND.requires_grad
        wants_weight = plan.wants_gradient and weight_VD.requires_grad
        d_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        sums = torch.zeros(4, dtype=torch.float32, device=hidden_ND.device)
        size = plan.objective.chunk_tokens or default_chunk_tokens(weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            chunk_sums, gradient_CV = _chunk(hidden_ND[rows], weight, rows, plan)
            sums += chunk_sums
            gradient_CV = gradient_CV.to(hidden_ND.dtype)
            if d_hidden is not None:
                torch.mm(gradient_CV, weight, out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight, gradient_CV, hidden_ND[rows])
        ctx.gradients = d_hidden, d_weight
        loss, ce, kd, teacher_ce = sums.unbind()
        ctx.mark_non_differentiable(ce, kd, teacher_ce)
        return loss, ce, kd, teacher_ce

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - as above
        grad_loss: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        # Scaled in place: a second [V, D] buffer would cost as much memory as the weight itself.
        d_hidden, d_weight = ctx.gradients
        del ctx.gradients  # a second backward fails instead of scaling twice
        return (
            None if d_hidden is None else d_hidden.mul_(grad_loss),
            None if d_weight is None else d_weight.mul_(grad_loss),
            None,
        )


def _accumulate(d_weight_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """d_weight += gradient.T @ hidden, in float32."""
    if gradient_CV.dtype == torch.float32:
        d_weight_VD.addmm_(gradient_CV.T, hidden_CD)
    else:
        d_weight_VD += (gradient_CV.T @ hidden_CD).float()


def _chunk(hidden_CD: Tensor, weight_VD: Tensor, rows: slice, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Loss sums [4] of one chunk, and the gradient of its loss with respect to the student's logits."""
    labels_C, alpha = plan.labels_N[rows], plan.alpha
    valid_C = labels_C != IGNORE_INDEX
    gold_C1 = labels_C.clamp(min=0).unsqueeze(1)
    logits_CV = (hidden_CD @ weight_VD.T).float()
    logp_CV = logits_CV.log_softmax(-1)
    ce_C = -logp_CV.gather(1, gold_C1).squeeze(1)
    if plan.targets is None:
        gradient_CV = logp_CV.exp_().scatter_add_(1, gold_C1, torch.full_like(ce_C, -1.0).unsqueeze(1))
        zero_C = torch.zeros_like(ce_C)
        per_token = (ce_C, ce_C, zero_C, zero_C)
    else:
        kd_C, teacher_ce_C, gradient_CV = _teach(logits_CV, logp_CV, gold_C1, rows, plan)
        per_token = ((1 - alpha) * ce_C + alpha * kd_C, ce_C, kd_C, teacher_ce_C)
    gradient_CV *= valid_C.unsqueeze(1)
    return torch.stack([x.masked_fill(~valid_C, 0.0).sum() for x in per_token]), gradient_CV


def _teach(
    logits_CV: Tensor, logp_CV: Tensor, gold_C1: Tensor, rows: slice, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence and teacher CE per token, and the mixed logit gradient. Overwrites both inputs."""
    assert plan.targets is not None  # noqa: S101 - narrows the type; the caller has checked
    objective, alpha, t = plan.objective, plan.alpha, plan.objective.temperature
    teacher_CV = (
        plan.targets.hidden_NE[rows] @ plan.targets.head_VE.to(plan.targets.hidden_NE.dtype).T
    ).float()
    teacher_logp_CV = teacher_CV.log_softmax(-1)
    teacher_ce_C = -teacher_logp_CV.gather(1, gold_C1).squeeze(1)
    divergence = DIVERGENCES[objective.divergence]
    scale = objective.kd_scale
    minus_ce = torch.full_like(teacher_ce_C, alpha - 1.0).unsqueeze(1)
    if t == 1.0 and objective.divergence == "forward_kl":
        p_CV = torch.exp(teacher_logp_CV, out=teacher_CV)
        kd_C = teacher_logp_CV.sub_(logp_CV).mul_(p_CV).sum(-1)
        gradient_CV = logp_CV.exp_().sub_(p_CV, alpha=alpha).scatter_add_(1, gold_C1, minus_ce)
        return kd_C, teacher_ce_C, gradient_CV
    kd_C, gradient_CV = divergence.value_and_gradient(
        (logits_CV / t).log_softmax(-1), (teacher_CV / t).log_softmax(-1)
    )
    gradient_CV = gradient_CV.mul_(alpha * scale / t).add_(logp_CV.exp_(), alpha=1.0 - alpha)
    return scale * kd_C, teacher_ce_C, gradient_CV.scatter_add_(1, gold_C1, minus_ce)
