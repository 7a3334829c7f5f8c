"""The production objective: head, loss and gradient per chunk of tokens, never holding [N, V].

Within a chunk the gradient with respect to the student's logits is written down rather than found by
autograd. With forward KL at T=1 the whole objective is cross-entropy against the mixture
(1 - alpha) onehot + alpha p_teacher, whose logit gradient is softmax(s) minus that mixture: one softmax, one
pass; the row functions in `tutelage.objective.kernels` do that, on the CPU and on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tutelage.objective.checks import check_inputs
from tutelage.objective.divergences import DIVERGENCES, HARD_LABELS
from tutelage.objective.kernels.dispatch import dense_rows, sparse_rows
from tutelage.objective.objective import (
    Objective,
    buckets,
    dense_logits,
    hardened,
    project,
    reduce_targets,
)
from tutelage.objective.stats import token_stats
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, LossSums, SparseTargets, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.objective.gates import Gate

_CHUNK_BYTES = {"cpu": 38 * 2**20, "cuda": 256 * 2**20, "mps": 128 * 2**20}
"""Size of one [chunk, V] float32 buffer. A head is read from memory once per chunk and product, so small
chunks are slow; docs/performance.md has the trade between time and memory."""
_DENSE = 1.6
"""A dense teacher's head is wider and is read once more per chunk, so its chunks are larger."""
_TEMPORARIES = 8
"""Forward KL works in place; the other divergences hold many temporaries, so their chunks are smaller."""


def default_chunk_tokens(vocab_size: int, device: str, dense: bool, divergence: str) -> int:
    """Tokens per chunk, by the size of the vocabulary, the device and the kind of targets."""
    size = _CHUNK_BYTES[device] / (4 * vocab_size)
    if divergence not in {"forward_kl", HARD_LABELS}:
        return max(8, int(size / _TEMPORARIES))
    return max(8, int(size * _DENSE if dense else size))


def chunked_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    alpha: float,
    objective: Objective,
    gate: Gate | None = None,
) -> LossSums:
    """Same arguments, value, gradient and errors as `reference_objective`, in a few chunks of memory.

    Gradients for `hidden_ND` and `weight_VD` are computed during the forward pass and scaled in the
    backward pass. Logits are float32 whatever the dtype of the hidden states; the weight's gradient is
    accumulated in float32.
    """
    check_inputs(hidden_ND, weight_VD, labels_N, targets, alpha, objective)
    plan = _Plan(labels_N, targets, alpha, objective, gate, torch.is_grad_enabled())
    return LossSums(*_ChunkedObjective.apply(hidden_ND, weight_VD, plan))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the autograd function needs beside the two differentiable tensors."""

    labels_N: Tensor
    targets: Targets | None
    alpha: float
    objective: Objective
    gate: Gate | None
    wants_gradient: bool


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch hands over an object of its own
        hidden_ND: Tensor,
        weight_VD: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        weight = weight_VD[: plan.objective.vocab_size].to(hidden_ND.dtype)
        wants_hidden = plan.wants_gradient and hidden_ND.requires_grad
        wants_weight = plan.wants_gradient and weight_VD.requires_grad
        d_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        sums = torch.zeros(5, dtype=torch.float32, device=hidden_ND.device)
        dense = plan.targets is not None and not isinstance(plan.targets, SparseTargets)
        size = plan.objective.chunk_tokens or default_chunk_tokens(
            len(weight), hidden_ND.device.type, dense, plan.objective.divergence
        )
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            chunk_sums, gradient_CV = _chunk(hidden_ND[rows], weight, rows, plan)
            sums += chunk_sums
            gradient_CV = gradient_CV.to(hidden_ND.dtype)
            if d_hidden is not None:
                torch.mm(gradient_CV, weight, out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight[: len(weight)], gradient_CV, hidden_ND[rows])
            del gradient_CV  # or the next chunk's logits would stand beside it
        ctx.gradients = d_hidden, d_weight
        loss, *metrics = sums.unbind()
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

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
    """Loss sums [5] of one chunk, and the gradient of its loss with respect to what the head gives."""
    objective, labels_C = plan.objective, plan.labels_N[rows]
    student_CV = project(hidden_CD, weight_VD, None, objective.student_logits)
    slope_CV = _slope(student_CV, objective)
    valid_C = labels_C != IGNORE_INDEX
    if plan.targets is None:
        ce_C, gradient_CV = _cross_entropy(student_CV, labels_C)
        ce_weight_C, kd_C = torch.ones_like(ce_C), torch.zeros_like(ce_C)
        alpha_C = kd_weight_C = teacher_ce_C = kd_C
    else:
        targets = _rows_of(plan.targets, rows)
        teacher_CV = (
            None if isinstance(targets, SparseTargets) else dense_logits(targets, slice(None), len(weight_VD))
        )
        alpha_C = _alpha(student_CV, teacher_CV, labels_C, targets, plan)
        ce_weight_C, kd_weight_C = objective.weights(alpha_C)
        ce_C, d_C, teacher_ce_C, gradient_CV = _teach(
            student_CV,
            teacher_CV,
            targets,
            labels_C,
            (ce_weight_C, objective.kd_scale * kd_weight_C),
            objective,
        )
        kd_C = objective.kd_scale * d_C
    if slope_CV is not None:
        gradient_CV = gradient_CV * slope_CV
    loss_C = ce_weight_C * ce_C + kd_weight_C * kd_C
    per_token = torch.stack([loss_C, ce_C, kd_C, teacher_ce_C, alpha_C])
    return per_token.masked_fill(~valid_C, 0.0).sum(1), gradient_CV


def _slope(student_CV: Tensor, objective: Objective) -> Tensor | float | None:
    """Derivative of the student's logit transform, from its output; None where it is 1."""
    transform = objective.student_logits
    if transform.softcap is not None:
        return transform.scale * (1 - (student_CV / transform.softcap) ** 2)
    return None if transform.scale == 1.0 else transform.scale


def _rows_of(targets: Targets, rows: slice) -> Targets:
    """The targets of one chunk of tokens."""
    if isinstance(targets, SparseTargets):
        return SparseTargets(
            targets.ids_NK[rows],
            targets.probs_NK[rows],
            targets.tail_N[rows],
            targets.gold_logp_N[rows],
            targets.temperature,
        )
    if isinstance(targets, LogitTargets):
        return LogitTargets(targets.logits_NV[rows])
    return DenseTargets(targets.hidden_NE[rows], targets.head_VE, targets.transform)


def _alpha(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, targets: Targets, plan: _Plan
) -> Tensor:
    """Alpha per token: the policy's, times the gate's factor."""
    alpha_C = torch.full(labels_C.shape, plan.alpha, dtype=torch.float32, device=labels_C.device)
    if plan.gate is None:
        return alpha_C
    ce_C = _label_losses(student_CV, labels_C)
    if isinstance(targets, SparseTargets):
        teacher_ce_C = -targets.gold_logp_N
    else:
        assert teacher_CV is not None  # noqa: S101 - dense targets have logits
        teacher_ce_C = _label_losses(teacher_CV, labels_C)
    return alpha_C * plan.gate(token_stats(plan.gate, student_CV, teacher_CV, targets, ce_C, teacher_ce_C))


def _label_losses(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return functional.cross_entropy(logits_CV, labels_C, reduction="none", ignore_index=IGNORE_INDEX)


def _cross_entropy(student_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token and its gradient, in the place of the logits: a teacher without weight."""
    zero_C, one_C = torch.zeros_like(student_CV[:, 0]), torch.ones_like(student_CV[:, 0])
    no_teacher = (labels_C.clamp(min=0).unsqueeze(1), zero_C.unsqueeze(1), zero_C)
    ce_C, _ = sparse_rows(student_CV, *no_teacher, labels_C, one_C, zero_C, 1.0, "none")
    return ce_C, student_CV


def _teach(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    targets: Targets,
    labels_C: Tensor,
    weights: tuple[Tensor, Tensor],
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE, divergence and teacher CE per token, and the mixed logit gradient."""
    sparse = targets if isinstance(targets, SparseTargets) else None
    if teacher_CV is not None:
        sparse = reduce_targets(teacher_CV, labels_C, objective)
    if sparse is not None:
        sparse, name, tail, t = hardened(sparse, objective)
        if name == "forward_kl":
            kept = (sparse.ids_NK, sparse.probs_NK, sparse.tail_N)
            ce_C, d_C = sparse_rows(student_CV, *kept, labels_C, *weights, t, tail)
            return ce_C, d_C, -sparse.gold_logp_N, student_CV
        d_C, gradient_CV = _bucketed(student_CV, sparse, objective)
        teacher_ce_C = -sparse.gold_logp_N
    else:
        assert teacher_CV is not None  # noqa: S101 - targets are sparse or dense
        if objective.divergence == "forward_kl":
            ce_C, d_C, teacher_ce_C = dense_rows(
                student_CV, teacher_CV, labels_C, *weights, objective.temperature
            )
            return ce_C, d_C, teacher_ce_C, student_CV
        t = objective.temperature
        d_C, gradient_CV = DIVERGENCES[objective.divergence].value_and_gradient(
            (student_CV / t).log_softmax(-1), (teacher_CV / t).log_softmax(-1), objective.shape
        )
        teacher_ce_C = _label_losses(teacher_CV, labels_C)
    ce_weight_C, kd_weight_C = weights
    ce_C, ce_gradient_CV = _cross_entropy(student_CV, labels_C)
    factor_C = kd_weight_C / objective.temperature * (labels_C != IGNORE_INDEX)
    gradient_CV = gradient_CV.mul_(factor_C.unsqueeze(1)).addcmul_(ce_gradient_CV, ce_weight_C.unsqueeze(1))
    return ce_C, d_C, teacher_ce_C, gradient_CV


def _bucketed(student_CV: Tensor, sparse: SparseTargets, objective: Objective) -> tuple[Tensor, Tensor]:
    """Any divergence over kept ids and a bucket, and its gradient spread back over the vocabulary.

    The bucket's gradient goes to its members in proportion to their share of it; shares come from the
    complement's own log-sum-exp, so they are exact however small the bucket is.
    """
    logq_CJ, logp_CJ, rest_CV = buckets(
        (student_CV / objective.temperature).log_softmax(-1), sparse, objective.tail
    )
    d_C, gradient_CJ = DIVERGENCES[objective.divergence].value_and_gradient(logq_CJ, logp_CJ, objective.shape)
    share_CV = (rest_CV - logq_CJ[:, -1:].clamp(min=-1e30)).exp_()
    used_CK = sparse.probs_NK > 0
    gradient_CV = share_CV.mul_(gradient_CJ[:, -1:])
    return d_C, gradient_CV.scatter_add_(1, sparse.ids_NK, gradient_CJ[:, :-1] * used_CK)
