"""Objective for training: head, loss and gradient per chunk of tokens, without ever holding [N, V].

Within a chunk the gradient with respect to the student's logits is computed by formula, not by autograd. With
forward KL at T=1 the whole objective is cross-entropy against (1 - alpha) onehot + alpha p_teacher, whose
logit gradient is softmax(s) minus that mixture: one softmax, one pass. The row functions in
`tutelage.objective.kernels` do that, on the CPU and on CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tutelage.objective.checks import check_inputs
from tutelage.objective.divergences import DIVERGENCES
from tutelage.objective.gates import token_stats
from tutelage.objective.kernels import dense_rows, sparse_rows
from tutelage.objective.products import HeadProducts, dense_logits, transform_, weight_and_bias
from tutelage.objective.sparse import apply_hard_labels, bucketise, truncate_targets
from tutelage.types import (
    IGNORE_INDEX,
    PLAIN,
    DenseTargets,
    LogitTransform,
    LossSums,
    Rows,
    SparseTargets,
    Targets,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from tutelage.config.objective_config import Objective
    from tutelage.objective.gates import Gate
    from tutelage.types import Targets


class ObjectiveHead(nn.Module):
    """Wrap a head so that a call returns its loss instead of its logits.

    FSDP2 gathers and reduces the parameters of a module around its call. With
    `fully_shard(ObjectiveHead(head, objective), reshard_after_forward=False)` the head is gathered once and
    its gradient reduced once per backward pass, however many chunks there are; the gradient is known
    after the forward pass, so there is nothing to gather again.

    Attributes:
        head: the student's output embedding, a linear layer. Not to be tied to the input embedding if this
            module is sharded on its own.
        objective: what is minimised.
        transform: what the student's family does to its logits.
        vocab_size: entries of the common vocabulary; None: all rows of the head.
    """

    def __init__(
        self,
        head: nn.Linear,
        objective: Objective,
        transform: LogitTransform = PLAIN,
        vocab_size: int | None = None,
    ) -> None:
        """Raise ValueError if the head is more than a linear layer."""
        super().__init__()
        weight_and_bias(head)
        self.head = head
        self.objective = objective
        self.transform = transform
        self.vocab_size = vocab_size

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        targets: Targets | None,
        alpha: float,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of `LossSums` in their order, as a tuple because FSDP2 finds tensors in tuples.

        Raises:
            ValueError: as `chunked_objective` does.
        """
        weight_VD, bias_V = weight_and_bias(self.head)
        settings = self.objective, gate, bias_V, self.transform, self.vocab_size
        sums = chunked_objective(hidden_ND, weight_VD, labels_N, targets, alpha, *settings)
        return sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha


def chunked_objective(
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
) -> LossSums:
    """Compute what `reference_objective` computes, from the same arguments, in a few chunks of memory.

    Gradients for `hidden_ND`, `weight_VD` and `bias_V` are computed during the forward pass and scaled in
    the backward pass. Logits, the loss, the gradient of the logits and the sums of all gradients are float32
    (or float64) whatever the dtype of the hidden states, also under autocast; a gradient is rounded once, to
    the dtype of what it belongs to. `tutelage.objective.products` says what a product rounds on CUDA.

    Tokens without a label cost nothing: no head is multiplied for them. To find them, a GPU is waited for.
    """
    check_inputs(hidden_ND, weight_VD, labels_N, targets, alpha, objective, bias_V, vocab_size)
    plan = _Plan(labels_N, targets, alpha, objective, gate, transform, vocab_size, torch.is_grad_enabled())
    with torch.autocast(hidden_ND.device.type, enabled=False):
        sums = _ChunkedObjective.apply(hidden_ND, weight_VD, bias_V, plan)  # type: ignore[no-untyped-call]
    return LossSums(*sums)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Arguments of the autograd function besides the differentiable tensors."""

    labels_N: Tensor
    targets: Targets | None
    alpha: float
    objective: Objective
    gate: Gate | None
    transform: LogitTransform
    vocab_size: int | None
    wants_gradient: bool


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch hands over an object of its own
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        vocab = len(weight_VD[: plan.vocab_size])
        head = HeadProducts.of(hidden_ND, weight_VD[:vocab])
        # The first chunk overwrites the weight's, which saves a pass over it.
        d_hidden, d_weight, d_bias = (
            new(x, dtype=head.dtype) if plan.wants_gradient and x is not None and x.requires_grad else None
            for x, new in (
                (hidden_ND, torch.zeros_like),
                (weight_VD, torch.empty_like),
                (bias_V, torch.zeros_like),
            )
        )
        if d_weight is not None:
            d_weight[vocab:] = 0
        sums = torch.zeros(5, dtype=head.dtype, device=hidden_ND.device)
        dense = plan.targets is not None and not isinstance(plan.targets, SparseTargets)
        size = plan.objective.tokens_per_chunk(vocab, hidden_ND.device.type, dense=dense)
        chunks = list(_chunks(plan.labels_N, size))
        largest = len(plan.labels_N[chunks[0]])
        head = head.keeping_logits(largest)
        teacher = _Teaching.of(plan.targets, vocab, largest)
        for number, rows in enumerate(chunks):
            hidden_CD = hidden_ND[rows]
            chunk_sums, gradient_CV = _chunk(
                _logits(hidden_CD, head, bias_V, plan.transform), plan.labels_N[rows], teacher, rows, plan
            )
            sums += chunk_sums
            if d_bias is not None:
                d_bias[:vocab] += gradient_CV.sum(0)
            if plan.wants_gradient:
                gradient = head.rounded(gradient_CV)
                if d_hidden is not None:
                    d_hidden[rows] = head.to_hidden(gradient)
                if d_weight is not None:
                    head.add_to_weight(d_weight[:vocab], gradient, hidden_CD, first=number == 0)
                del gradient
            del gradient_CV  # where it is not in the place of the logits, it would stand beside the next ones
        ctx.gradients = d_hidden, d_weight, d_bias
        # Copies, since a view among the outputs of a function could not be changed in place.
        loss, *metrics = (total.clone() for total in sums)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - as above
        grad_loss: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        # Scaled in place: a second [V, D] buffer would cost as much memory as the weight itself. Autograd
        # rounds each to the dtype of its input.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "a second backward pass: the first handed the gradients on; call the objective again"
            )
        return *(None if x is None else x.mul_(grad_loss) for x in gradients), None


def _chunks(labels_N: Tensor, size: int) -> Iterator[Rows]:
    """Yield the tokens that have a label in chunks, at least one, so that gates are always called.

    Chunks of equal size: as few as chunks of `size` would be, but none of the heads is read for a few tokens.
    """
    kept_K = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    everything = len(kept_K) == len(labels_N)
    count = max(1, math.ceil(len(kept_K) / size))
    size = max(1, math.ceil(len(kept_K) / count))
    for start in range(0, max(1, len(kept_K)), size):
        rows = slice(start, start + size)
        yield rows if everything else kept_K[rows]


@dataclass(frozen=True, slots=True)
class _Teaching:
    """The targets of a call and the products of the teacher's head, if it has one, for all chunks."""

    targets: Targets
    head: HeadProducts | None

    @classmethod
    def of(cls, targets: Targets | None, vocab: int, tokens: int) -> _Teaching | None:
        """Leave out padded rows of the teacher's head, and make room for the logits of `tokens` tokens."""
        if not isinstance(targets, DenseTargets):
            return None if targets is None else cls(targets, None)
        targets = targets.without_padding(vocab)
        return cls(targets, HeadProducts.of(targets.hidden_NE, targets.head_VE).keeping_logits(tokens))


def _logits(
    hidden_CD: Tensor, head: HeadProducts, bias_V: Tensor | None, transform: LogitTransform
) -> Tensor:
    logits_CV = head.logits(hidden_CD)
    if bias_V is not None:
        logits_CV += bias_V[: logits_CV.shape[1]]
    return transform_(logits_CV, transform)


def _chunk(
    student_CV: Tensor, labels_C: Tensor, teaching: _Teaching | None, rows: Rows, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Compute the loss sums [5] of one chunk and the gradient of its head's output.

    The student's logits, after their transform, may be overwritten by the gradient.
    """
    objective = plan.objective
    transform_grad_CV = logit_transform_grad(student_CV, plan.transform)
    if teaching is None:
        ce_C, gradient_CV = _cross_entropy(student_CV, labels_C)
        ce_weight_C, kd_C = torch.ones_like(ce_C), torch.zeros_like(ce_C)
        alpha_C = kd_weight_C = teacher_ce_C = kd_C
    else:
        targets, teacher_CV = teaching.targets, None
        if isinstance(targets, SparseTargets):
            targets = targets.rows(rows)
        else:
            teacher_CV = dense_logits(targets, rows, student_CV.shape[1], teaching.head).to(student_CV.dtype)
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
    if transform_grad_CV is not None:
        gradient_CV.mul_(transform_grad_CV)
    loss_C = ce_weight_C * ce_C + kd_weight_C * kd_C
    return torch.stack([loss_C, ce_C, kd_C, teacher_ce_C, alpha_C]).sum(1), gradient_CV


def logit_transform_grad(student_CV: Tensor, transform: LogitTransform) -> Tensor | float | None:
    """Derivative of a logit transform, from its output; None where it is 1."""
    if transform.softcap is not None:
        return (student_CV / transform.softcap).square_().neg_().add_(1.0).mul_(transform.scale)
    return None if transform.scale == 1.0 else transform.scale


def _alpha(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, targets: Targets, plan: _Plan
) -> Tensor:
    """Alpha per token: the policy's, times the gate's factor."""
    alpha_C = torch.full_like(student_CV[:, 0], plan.alpha)
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
    return functional.cross_entropy(logits_CV, labels_C, reduction="none")


def _cross_entropy(student_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy per token, and its gradient in the place of the logits."""
    zero_C, one_C = torch.zeros_like(student_CV[:, 0]), torch.ones_like(student_CV[:, 0])
    no_teacher = (torch.zeros_like(labels_C).unsqueeze(1), zero_C.unsqueeze(1), zero_C)
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
    """Compute CE, divergence and teacher CE per token, and the mixed logit gradient."""
    sparse = targets if isinstance(targets, SparseTargets) else None
    if teacher_CV is not None:
        sparse = truncate_targets(teacher_CV, labels_C, objective)
    if sparse is not None:
        sparse, objective = apply_hard_labels(sparse, objective)
        if objective.divergence == "forward_kl":
            kept = (sparse.ids_NK, sparse.probs_NK, sparse.tail_N)
            temperature, tail = objective.temperature, objective.tail
            ce_C, d_C = sparse_rows(student_CV, *kept, labels_C, *weights, temperature, tail)
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
            (student_CV / t).log_softmax(-1), (teacher_CV / t).log_softmax(-1), objective
        )
        teacher_ce_C = _label_losses(teacher_CV, labels_C)
    ce_weight_C, kd_weight_C = weights
    ce_C, ce_gradient_CV = _cross_entropy(student_CV, labels_C)
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
