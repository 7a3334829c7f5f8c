"""Reference of the training objective: CE, a divergence from the teacher, and their mixture, as plain maths.

`reference_objective` holds all logits and lets autograd find the gradient; it is for reading and for tests.
Training uses `tutelage.objective.chunked.chunked_objective`, which has the same signature and value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tutelage.objective.checks import check_gate, check_inputs, check_types
from tutelage.objective.divergences import DIVERGENCES
from tutelage.objective.gates import token_stats, token_weights
from tutelage.objective.products import dense_logits, wide_dtype
from tutelage.objective.sparse import apply_hard_labels, bucketise, truncate_targets
from tutelage.types import (
    IGNORE_INDEX,
    PLAIN,
    LogitTransform,
    LossSums,
    SparseTargets,
    Targets,
    TokenLosses,
    transformed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.config.objective_config import Objective
    from tutelage.objective.gates import Gate


def reference_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    alpha: float,
    objective: Objective,
    gate: Gate | None = None,
    bias_V: Tensor | None = None,
    transform: LogitTransform = PLAIN,
    vocab_size: int | None = None,
    token_weights_N: Tensor | None = None,
    *,
    per_token: bool = False,
) -> LossSums:
    """Sum the objective over valid tokens, holding all [N, V] logits; arguments as in `chunked_objective`.

    Hidden states and heads are multiplied in float32, whatever their dtype; nothing given is written to.
    """
    check_types(hidden_ND, weight_VD, labels_N, targets, alpha, objective, bias_V, token_weights_N, transform)
    check_gate(objective, gate, alpha, targets, labels_N)
    given = labels_N, targets, alpha, objective
    check_inputs(hidden_ND, weight_VD, *given, bias_V, vocab_size, token_weights_N)
    dtype = wide_dtype(hidden_ND, weight_VD)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = hidden_ND.to(dtype) @ weight_VD[:vocab_size].to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[:vocab_size]
    logits_NV = transformed(logits_NV, transform)
    ce_N, smoothed_ce_N = (
        F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=smoothing)
        for smoothing in (0.0, objective.label_smoothing)
    )
    kd_N, teacher_ce_N, alpha_N = (torch.zeros_like(ce_N) for _ in range(3))
    ce_weight_N, kd_weight_N = torch.ones_like(ce_N), alpha_N
    if targets is not None:
        teacher_NV = None
        if not isinstance(targets, SparseTargets):
            teacher_NV = dense_logits(targets, slice(None), vocab_size).to(logits_NV.dtype)
        d_N, teacher_ce_N = _divergence(logits_NV, teacher_NV, labels_N, targets, objective)
        kd_N = objective.kd_scale * d_N
        factor_N = torch.ones_like(ce_N)
        if gate is not None:
            factor_N = gate(token_stats(gate, logits_NV, teacher_NV, targets, ce_N, teacher_ce_N))
        alpha_N, ce_weight_N, kd_weight_N = token_weights(objective, gate, alpha, factor_N)
    loss_N = ce_weight_N * smoothed_ce_N + kd_weight_N * kd_N
    if objective.z_loss:
        loss_N = loss_N + objective.z_loss * logits_NV.logsumexp(-1).square()
    if token_weights_N is not None:
        loss_N = token_weights_N * loss_N
    entropy_N = torch.special.entr(logits_NV.softmax(-1)).sum(-1)
    losses = [
        torch.where(labels_N == IGNORE_INDEX, 0.0, x)
        for x in (loss_N, ce_N, kd_N, teacher_ce_N, alpha_N, entropy_N)
    ]
    loss, ce, kd, teacher_ce, effective_alpha = (x.sum() for x in losses[:5])
    tokens = TokenLosses(*(x.detach() for x in losses)) if per_token else None
    return LossSums(loss, ce.detach(), kd.detach(), teacher_ce.detach(), effective_alpha.detach(), tokens)


def _divergence(
    logits_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor, targets: Targets, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Divergence and teacher CE per token."""
    sparse = None
    if isinstance(targets, SparseTargets):
        probs_NK, tail_N = targets.probs_NK.detach(), targets.tail_N.detach()
        kept = targets.ids_NK, probs_NK, tail_N, targets.gold_logp_N.detach()
        sparse = SparseTargets(*kept, targets.temperature)
    if teacher_NV is not None:
        sparse = truncate_targets(teacher_NV, labels_N, objective)
    if sparse is not None:
        sparse, objective = apply_hard_labels(sparse, objective)
        logq_NJ, logp_NJ, *_ = bucketise(
            (logits_NV / objective.temperature).log_softmax(-1), sparse, objective.tail
        )
        return DIVERGENCES[objective.divergence].value(logq_NJ, logp_NJ, objective), -sparse.gold_logp_N
    assert teacher_NV is not None  # noqa: S101 - targets are sparse or dense
    t = objective.temperature
    logq_NV, logp_NV = (logits_NV / t).log_softmax(-1), (teacher_NV / t).log_softmax(-1)
    d_N = DIVERGENCES[objective.divergence].value(logq_NV, logp_NV, objective)
    gold_N = teacher_NV.log_softmax(-1).gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    return d_N, -gold_N
