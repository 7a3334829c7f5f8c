"""The losses of a step and all their gradients, chunk by chunk of tokens: [N, V] never exists.

Within a chunk the gradient with respect to the student's logits is computed by formula, not by autograd. With
forward KL at T=1 the whole objective is cross-entropy against (1 - alpha) onehot + alpha p_teacher, whose
logit gradient is softmax(s) minus that mixture: one softmax, one pass. The row functions in
`tutelage.objective.kernels` do that, on the CPU and on CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from tutelage.config.objective_config import TILE
from tutelage.objective.divergences import DIVERGENCES
from tutelage.objective.gates import token_stats, token_weights
from tutelage.objective.kernels import dense_rows, kernels_for, sparse_rows
from tutelage.objective.products import HeadProducts, dense_logits, products_of, transform_
from tutelage.objective.sparse import apply_hard_labels, bucketise, truncate_targets
from tutelage.types import (
    IGNORE_INDEX,
    PLAIN,
    DenseTargets,
    LogitTransform,
    MeanTargets,
    Rows,
    SparseTargets,
    Targets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tutelage.config.objective_config import Objective
    from tutelage.objective.gates import Gate

_ENTRIES, _ACCELERATOR_ENTRIES = 2**20, 2**24
"""Logits that a pass over rows, besides those of the kernels, takes at a time: it makes copies of them."""


@dataclass(frozen=True, slots=True)
class LossCall:
    """Arguments of the objective besides the differentiable tensors, as `chunked_objective` has them."""

    labels_N: Tensor
    targets: Targets | None
    alpha: float
    objective: Objective
    gate: Gate | None
    transform: LogitTransform
    vocab_size: int | None
    token_weights_N: Tensor | None = None
    per_token: bool = False


class Computed(NamedTuple):
    """What comes out of all chunks.

    Attributes:
        sums: [5], the losses in the order of `LossSums`.
        tokens_6N: the same per token in the order of `TokenLosses`, 0 where there is no label; None if not
            asked for.
        gradients: of hidden states, weight and bias, in the wide dtype; None where not wanted.
    """

    sums: Tensor
    tokens_6N: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def compute(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: LossCall, wanted: Sequence[bool]
) -> Computed:
    """Compute losses and the `wanted` of their gradients, for hidden states, weight and bias."""
    vocab = len(weight_VD[: call.vocab_size])
    head = HeadProducts.of(hidden_ND, weight_VD[:vocab])
    # The first chunk overwrites the weight's, which saves a pass over it.
    d_hidden, d_weight, d_bias = (
        new(x, dtype=head.dtype) if wants and x is not None else None
        for wants, x, new in zip(
            wanted,
            (hidden_ND, weight_VD, bias_V),
            (torch.zeros_like, torch.empty_like, torch.zeros_like),
            strict=True,
        )
    )
    sums = torch.zeros(5, dtype=head.dtype, device=hidden_ND.device)
    tokens_6N = sums.new_zeros(6, len(call.labels_N)) if call.per_token else None
    dense = call.targets is not None and not isinstance(call.targets, SparseTargets)
    size = call.objective.tokens_per_chunk(vocab, hidden_ND.device.type, dense=dense)
    chunks = list(chunks_of(call.labels_N, size, 1 if hidden_ND.device.type == "cpu" else TILE))
    largest = len(call.labels_N[chunks[0]])
    if d_weight is not None:
        d_weight[vocab if largest else 0 :] = 0
    head = head.keeping_logits(largest)
    teacher = _Teaching.of(call.targets, vocab, largest)
    addends_SV = _room_for_addends(head, largest, call) if any(wanted) else None
    for number, rows in enumerate(chunks):
        hidden_CD = hidden_ND[rows]
        student_CV = _logits(hidden_CD, head, bias_V, call.transform)
        if tokens_6N is not None:
            tokens_6N[5, rows] = _by_rows(_entropy, student_CV)
        addends_AV = None if addends_SV is None else addends_SV[: 2 * len(hidden_CD)]
        losses_5C, gradient_AV = _chunk(student_CV, call.labels_N[rows], teacher, rows, call, addends_AV)
        del student_CV
        sums += losses_5C.sum(1)
        if tokens_6N is not None:
            tokens_6N[:5, rows] = losses_5C
        if d_bias is not None:
            d_bias[:vocab] += gradient_AV.sum(0, dtype=d_bias.dtype)
        if any(wanted) and largest:
            gradient = head.rounded(gradient_AV)
            if d_hidden is not None:
                d_hidden[rows] = head.to_hidden(gradient)
            if d_weight is not None:
                head.add_to_weight(d_weight[:vocab], gradient, hidden_CD, first=number == 0)
            del gradient
        del gradient_AV  # where it is not in the place of the logits, it would stand beside the next ones
    return Computed(sums, tokens_6N, (d_hidden, d_weight, d_bias))


def _room_for_addends(head: HeadProducts, tokens: int, call: LossCall) -> Tensor | None:
    """Memory for the gradient of logits as two addends, if Triton's kernels can write all of it so.

    Not where something is added to it or where it is multiplied after them, nor for other divergences.
    """
    objective, device = call.objective, head.weight_VD.device
    plain = objective.label_smoothing == objective.z_loss == 0 and call.transform == PLAIN
    if not plain or objective.divergence not in ("forward_kl", "hard_labels"):
        return None
    if head.half != torch.bfloat16 or kernels_for(device.type) != "triton":
        return None
    return torch.empty(2 * tokens, len(head.weight_VD), dtype=head.half, device=device)


def chunks_of(labels_N: Tensor, size: int, tile: int = 1) -> Iterator[Rows]:
    """Yield the tokens that have a label in chunks, at least one, so that gates are always called.

    Chunks of equal size: as few as chunks of `size` would be, but none of the heads is read for a few tokens.
    If `size` is a multiple of `tile`, so are all but the last.
    """
    kept_K = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    everything = len(kept_K) == len(labels_N)
    count = max(1, math.ceil(len(kept_K) / size))
    tile = tile if size % tile == 0 else 1
    size = max(1, math.ceil(len(kept_K) / count / tile)) * tile
    for start in range(0, max(1, len(kept_K)), size):
        rows = slice(start, start + size)
        yield rows if everything else kept_K[rows]


@dataclass(frozen=True, slots=True)
class _Teaching:
    """The targets of a call and the products of the teachers' heads, if they have any, for all chunks."""

    targets: Targets
    heads: tuple[HeadProducts, ...]

    @classmethod
    def of(cls, targets: Targets | None, vocab: int, tokens: int) -> _Teaching | None:
        """Leave out padded rows of the teacher's head, and make room for the logits of `tokens` tokens."""
        if isinstance(targets, DenseTargets | MeanTargets):
            targets = targets.without_padding(vocab)
            return cls(targets, products_of(targets, tokens))
        return None if targets is None else cls(targets, ())


def _logits(
    hidden_CD: Tensor, head: HeadProducts, bias_V: Tensor | None, transform: LogitTransform
) -> Tensor:
    logits_CV = head.logits(hidden_CD)
    if bias_V is not None:
        logits_CV += bias_V[: logits_CV.shape[1]]
    return transform_(logits_CV, transform)


def _chunk(
    student_CV: Tensor,
    labels_C: Tensor,
    teaching: _Teaching | None,
    rows: Rows,
    call: LossCall,
    addends_AV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the losses [5, C] of one chunk and the gradient of its head's output.

    The student's logits, after their transform, may be overwritten by the gradient; or it is in `addends_AV`,
    as `kernels.dense_rows` says.
    """
    objective = call.objective
    transform_grad_CV = logit_transform_grad(student_CV, call.transform)
    weight_C = None if call.token_weights_N is None else call.token_weights_N[rows].to(student_CV.dtype)
    smooth = _Smoothing.of(student_CV, labels_C, weight_C, objective)
    targets, teacher_CV = None, None
    if teaching is None:
        alpha_C = kd_weight_C = kd_C = teacher_ce_C = torch.zeros_like(student_CV[:, 0])
        ce_weight_C = torch.ones_like(alpha_C)
    else:
        targets = teaching.targets
        if isinstance(targets, SparseTargets):
            targets = targets.rows(rows)
        else:
            teacher_CV = dense_logits(targets, rows, student_CV.shape[1], teaching.heads).to(student_CV.dtype)
        factor_C = _factor(student_CV, teacher_CV, labels_C, targets, rows, call.gate)
        alpha_C, ce_weight_C, kd_weight_C = token_weights(objective, call.gate, call.alpha, factor_C)
    if weight_C is not None:
        ce_weight_C, kd_weight_C = weight_C * ce_weight_C, weight_C * kd_weight_C
    softmax_weight_C = ce_weight_C if smooth is None else smooth.softmax_weight(ce_weight_C)
    if targets is None:
        ce_C, gradient_CV = _cross_entropy(student_CV, labels_C, softmax_weight_C, addends_AV)
    else:
        weights = softmax_weight_C, objective.kd_scale * kd_weight_C
        ce_C, d_C, teacher_ce_C, gradient_CV = _teach(
            student_CV, teacher_CV, targets, labels_C, weights, objective, addends_AV
        )
        kd_C = objective.kd_scale * d_C
    loss_C = ce_weight_C * ce_C + kd_weight_C * kd_C
    if smooth is not None:
        loss_C += smooth.add(gradient_CV, ce_weight_C)
    if transform_grad_CV is not None:
        gradient_CV.mul_(transform_grad_CV)
    return torch.stack([loss_C, ce_C, kd_C, teacher_ce_C, alpha_C]), gradient_CV


@dataclass(frozen=True, slots=True)
class _Smoothing:
    """Label smoothing and z-loss of one chunk, from its logits before the gradient takes their place.

    The row functions know neither. They are given the weight c + 2 z log Z for their cross-entropy, c being
    its true weight, and compute (c + 2 z log Z)(softmax - onehot). At the labels, and with smoothing at all
    entries, a constant is left to be added: the softmax itself is the one that they compute anyway.

    Attributes:
        share: of the labels' mass, spread evenly over the vocabulary.
        z_weight: of the z-loss, one number or one per token.
        gold_C1: the labels; 0 in the place of one outside the vocabulary, whose loss is NaN.
        gold_logit_C: logits of the labels.
        mean_C: means of all logits.
        log_z_C: log-sum-exp of all logits.
    """

    share: float
    z_weight: float | Tensor
    gold_C1: Tensor
    gold_logit_C: Tensor
    mean_C: Tensor
    log_z_C: Tensor

    @classmethod
    def of(
        cls, student_CV: Tensor, labels_C: Tensor, weight_C: Tensor | None, objective: Objective
    ) -> _Smoothing | None:
        """Read the logits; None where the objective asks for neither."""
        if objective.label_smoothing == objective.z_loss == 0:
            return None
        z_weight = objective.z_loss if weight_C is None else objective.z_loss * weight_C
        gold_C1 = labels_C.clamp(0, student_CV.shape[1] - 1).unsqueeze(1)
        gold_logit_C, mean_C = student_CV.gather(1, gold_C1).squeeze(1), student_CV.mean(1)
        log_z_C = _by_rows(lambda logits_BV: logits_BV.logsumexp(-1), student_CV)
        return cls(objective.label_smoothing, z_weight, gold_C1, gold_logit_C, mean_C, log_z_C)

    def softmax_weight(self, ce_weight_C: Tensor) -> Tensor:
        """The weight of the softmax in the gradient: that of the cross-entropy and of the z-loss together."""
        return ce_weight_C + 2 * self.z_weight * self.log_z_C

    def add(self, gradient_CV: Tensor, ce_weight_C: Tensor) -> Tensor:
        """Complete the gradient in place; return what smoothing and z-loss add to the loss."""
        missing_C = self.softmax_weight(ce_weight_C) - (1 - self.share) * ce_weight_C
        gradient_CV.scatter_add_(1, self.gold_C1, missing_C.unsqueeze(1))
        spread_C = self.share * ce_weight_C
        gradient_CV.sub_((spread_C / gradient_CV.shape[1]).unsqueeze(1))
        return spread_C * (self.gold_logit_C - self.mean_C) + self.z_weight * self.log_z_C.square()


def _by_rows(function: Callable[[Tensor], Tensor], logits_CV: Tensor) -> Tensor:
    """Apply a function of logits to some rows at a time."""
    entries = _ENTRIES if logits_CV.device.type == "cpu" else _ACCELERATOR_ENTRIES
    size = max(1, entries // logits_CV.shape[1])
    return torch.cat([function(logits_BV) for logits_BV in torch.split(logits_CV, size)])


def _entropy(logits_BV: Tensor) -> Tensor:
    """Entropy in nats of each row."""
    logq_BV = logits_BV.log_softmax(-1)
    return -(logq_BV.exp() * logq_BV).sum(-1)


def logit_transform_grad(student_CV: Tensor, transform: LogitTransform) -> Tensor | float | None:
    """Derivative of a logit transform, from its output; None where it is 1."""
    if transform.softcap is not None:
        return (student_CV / transform.softcap).square_().neg_().add_(1.0).mul_(transform.scale)
    return None if transform.scale == 1.0 else transform.scale


def _factor(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    targets: Targets,
    rows: Rows,
    gate: Gate | None,
) -> Tensor:
    """The gate's factor on alpha per token."""
    if gate is None:
        return torch.ones_like(student_CV[:, 0])
    ce_C = _label_losses(student_CV, labels_C)
    if isinstance(targets, SparseTargets):
        teacher_ce_C = -targets.gold_logp_N
    else:
        assert teacher_CV is not None  # noqa: S101 - dense targets have logits
        teacher_ce_C = _label_losses(teacher_CV, labels_C)
    return gate(token_stats(gate, student_CV, teacher_CV, targets, ce_C, teacher_ce_C, rows)).to(ce_C.dtype)


def _label_losses(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return functional.cross_entropy(logits_CV, labels_C, reduction="none")


def _cross_entropy(
    student_CV: Tensor, labels_C: Tensor, weight_C: Tensor, addends_AV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy per token, and the gradient of its weighted sum; the logits are overwritten."""
    zero_C = torch.zeros_like(weight_C)
    no_teacher = (torch.zeros_like(labels_C).unsqueeze(1), zero_C.unsqueeze(1), zero_C)
    ce_C, _ = sparse_rows(student_CV, *no_teacher, labels_C, weight_C, zero_C, 1.0, "none", addends_AV)
    return ce_C, student_CV if addends_AV is None else addends_AV


def _teach(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    targets: Targets,
    labels_C: Tensor,
    weights: tuple[Tensor, Tensor],
    objective: Objective,
    addends_AV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute CE, divergence and teacher CE per token, and the mixed logit gradient."""
    gradient_AV = student_CV if addends_AV is None else addends_AV
    sparse = targets if isinstance(targets, SparseTargets) else None
    if teacher_CV is not None:
        sparse = truncate_targets(teacher_CV, labels_C, objective)
    if sparse is not None:
        sparse, objective = apply_hard_labels(sparse, objective)
        if objective.divergence == "forward_kl":
            kept = (sparse.ids_NK, sparse.probs_NK, sparse.tail_N)
            temperature, tail = objective.temperature, objective.tail
            ce_C, d_C = sparse_rows(student_CV, *kept, labels_C, *weights, temperature, tail, addends_AV)
            return ce_C, d_C, -sparse.gold_logp_N, gradient_AV
        d_C, gradient_CV = _bucketed(student_CV, sparse, objective)
        teacher_ce_C = -sparse.gold_logp_N
    else:
        assert teacher_CV is not None  # noqa: S101 - targets are sparse or dense
        if objective.divergence == "forward_kl":
            ce_C, d_C, teacher_ce_C = dense_rows(
                student_CV, teacher_CV, labels_C, *weights, objective.temperature, addends_AV
            )
            return ce_C, d_C, teacher_ce_C, gradient_AV
        t = objective.temperature
        d_C, gradient_CV = DIVERGENCES[objective.divergence].value_and_gradient(
            (student_CV / t).log_softmax(-1), (teacher_CV / t).log_softmax(-1), objective
        )
        teacher_ce_C = _label_losses(teacher_CV, labels_C)
    ce_weight_C, kd_weight_C = weights
    ce_C, ce_gradient_CV = _cross_entropy(student_CV, labels_C, torch.ones_like(ce_weight_C))
    factor_C = kd_weight_C / objective.temperature
    gradient_CV = gradient_CV.mul_(factor_C.unsqueeze(1)).addcmul_(ce_gradient_CV, ce_weight_C.unsqueeze(1))
    return ce_C, d_C, teacher_ce_C, gradient_CV


def _bucketed(student_CV: Tensor, sparse: SparseTargets, objective: Objective) -> tuple[Tensor, Tensor]:
    """Compute any divergence over kept ids and a bucket, and spread its gradient over the vocabulary.

    The bucket's gradient goes to its members in proportion to their share of it; shares come from the
    complement's own log-sum-exp, so they are exact however small the bucket is.
    """
    logq_CJ, logp_CJ, rest_CV, ids_CK = bucketise(
        (student_CV / objective.temperature).log_softmax(-1), sparse, objective.tail
    )
    d_C, gradient_CJ = DIVERGENCES[objective.divergence].value_and_gradient(logq_CJ, logp_CJ, objective)
    share_CV = (rest_CV - logq_CJ[:, -1:].clamp(min=-1e30)).exp_()
    gradient_CV = share_CV.mul_(gradient_CJ[:, -1:])
    return d_C, gradient_CV.scatter_add_(1, ids_CK, gradient_CJ[:, :-1])
