"""The training objective as readable maths: CE, a divergence from the teacher, and how they are mixed.

`reference_objective` holds all logits and lets autograd find the gradient; it is for reading and for tests.
Training uses `tutelage.objective.chunked.chunked_objective`, which has the same signature and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tutelage.config.objective_config import COLDEST, HOTTEST
from tutelage.objective.checks import check_inputs
from tutelage.objective.divergences import DIVERGENCES, HARD_LABELS, Shape
from tutelage.objective.gates import token_stats
from tutelage.objective.kernels.rows import teacher_slots
from tutelage.objective.products import HeadProducts, wide_dtype
from tutelage.objective.sparse import TopK, Truncation, check_count, merge_repeats, truncate
from tutelage.types import (
    IGNORE_INDEX,
    PLAIN,
    DenseTargets,
    LogitTargets,
    LogitTransform,
    LossSums,
    SparseTargets,
    Targets,
    transformed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.objective.gates import Gate

MIXINGS = ("convex", "keep_full_ce", "keep_full_kd")
TAILS = ("other_bucket", "renormalise", "none")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised.

    Attributes:
        divergence: a name in `DIVERGENCES`, or "hard_labels" (forward KL from the teacher's argmax, T=1).
        temperature: T in [0.01, 100]; both models' logits are divided by it inside the divergence. Beyond,
            float32 does not hold what is left: T^2 times a rounding error of 1e-7 is 0.001 nats at 100.
        temperature_squared: multiply the divergence, value and gradient, by T^2 (Hinton et al., arXiv
            1503.02531), which keeps its gradient from shrinking as T grows. Off for hard labels.
        mixing: "convex" (1 - alpha) CE + alpha D; "keep_full_ce" CE + alpha D; "keep_full_kd"
            (1 - alpha) CE + D (the loss-scale ablation of arXiv 2605.23857).
        tail: what becomes of teacher mass outside sparse ids. "other_bucket": one more outcome, on both
            sides. "renormalise": the teacher is renormalised over the ids, the student is not (arXiv
            2605.23857). "none": weights as they are, for unbiased samples (forward KL only).
        jsd_beta: teacher's weight in the mixture of jsd, in (0, 1).
        skew: weight of the other side in skew_kl and skew_reverse_kl, in (0, 1).
        truncation: cut dense targets to their top-k or top-p, chunk by chunk.
        student_logits: what the student's family does to its logits.
        vocab_size: entries of the common vocabulary; later rows of either head are padding and take no
            probability. None: all rows.
        chunk_tokens: tokens whose logits exist at one time; None lets the chunked path choose.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = True
    mixing: str = "convex"
    tail: str = "other_bucket"
    jsd_beta: float = 0.5
    skew: float = 0.1
    truncation: Truncation | None = None
    student_logits: LogitTransform = PLAIN
    vocab_size: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        names = (*DIVERGENCES, HARD_LABELS)
        for field, value, allowed in (
            ("divergence", self.divergence, names),
            ("mixing", self.mixing, MIXINGS),
            ("tail", self.tail, TAILS),
        ):
            if value not in allowed:
                raise ValueError(f"{field} {value!r}: choose one of {', '.join(allowed)}")
        if not COLDEST <= self.temperature <= HOTTEST:
            raise ValueError(f"temperature {self.temperature}: must be between {COLDEST:g} and {HOTTEST:g}")
        for field, count in (("vocab_size", self.vocab_size), ("chunk_tokens", self.chunk_tokens)):
            if count is not None:
                check_count(field, count)
        for field, number in (("jsd_beta", self.jsd_beta), ("skew", self.skew)):
            if not 0 < number < 1:
                raise ValueError(f"{field} {number}: must be strictly between 0 and 1")
        if self.tail == "none" and self.divergence not in {"forward_kl", HARD_LABELS}:
            raise ValueError(f"tail 'none' is unbiased for forward_kl only, not for {self.divergence}")

    @property
    def kd_scale(self) -> float:
        """Factor on the divergence: T^2 or 1."""
        squared = self.temperature_squared and self.divergence != HARD_LABELS
        return self.temperature**2 if squared else 1.0

    @property
    def shape(self) -> Shape:
        """Parameters of the divergence."""
        return Shape(self.jsd_beta, self.skew)

    def weights(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of CE, weight of the divergence without T^2) for an alpha per token."""
        one = torch.ones_like(alpha)
        ce = one if self.mixing == "keep_full_ce" else 1 - alpha
        return ce, one if self.mixing == "keep_full_kd" else alpha


def project(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    vocab_size: int | None,
    transform: LogitTransform,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Logits of the real vocabulary, float32 or wider; padded rows of the head are left out, not set to zero.

    Hidden states and head are brought to float32 before they are multiplied, also under autocast.
    """
    dtype = wide_dtype(hidden_ND, weight_VD)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = hidden_ND.to(dtype) @ weight_VD[:vocab_size].to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[:vocab_size]
    return transformed(logits_NV, transform)


@torch.no_grad()
def dense_logits(targets: DenseTargets | LogitTargets, rows: slice, vocab_size: int | None) -> Tensor:
    """Teacher logits [rows, V] of the real vocabulary, float32 or wider.

    Those of `LogitTargets` may be the caller's own memory, which must not change.
    """
    if isinstance(targets, LogitTargets):
        logits_NV = targets.logits_NV[rows, :vocab_size]
        return logits_NV.to(wide_dtype(logits_NV))
    head = HeadProducts.of(targets.hidden_NE, targets.head_VE[:vocab_size])
    with torch.autocast(targets.hidden_NE.device.type, enabled=False):
        logits_NV = head.logits(targets.hidden_NE[rows])
    if targets.bias_V is not None:
        logits_NV += targets.bias_V[:vocab_size]
    return transformed(logits_NV, targets.transform)


def reduce_targets(logits_NV: Tensor, labels_N: Tensor, objective: Objective) -> SparseTargets | None:
    """Dense teacher logits as sparse targets, where the objective truncates or takes hard labels."""
    truncation, t = objective.truncation, objective.temperature
    if objective.divergence == HARD_LABELS:
        truncation, t = TopK(1), 1.0
    if truncation is None:
        return None
    gold_N = logits_NV.log_softmax(-1).gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    ids_NK, probs_NK, tail_N = truncate((logits_NV / t).log_softmax(-1), truncation)
    return SparseTargets(ids_NK, probs_NK, tail_N, gold_N, t)


def hardened(sparse: SparseTargets, objective: Objective) -> tuple[SparseTargets, str, str, float]:
    """(targets, divergence, tail policy, temperature), with hard labels as top-1 renormalised at T=1."""
    if objective.divergence != HARD_LABELS:
        return sparse, objective.divergence, objective.tail, objective.temperature
    ids_NK, probs_NK = merge_repeats(sparse.ids_NK, sparse.probs_NK)
    largest_N1, top_N1 = probs_NK.max(-1, keepdim=True)
    one_N1 = (largest_N1 > 0).float()  # 0 where the teacher says nothing
    top = SparseTargets(ids_NK.gather(1, top_N1), one_N1, one_N1[:, 0] * 0, sparse.gold_logp_N)
    return top, "forward_kl", "renormalise", 1.0


def buckets(logq_NV: Tensor, sparse: SparseTargets, tail: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher over kept ids and one bucket for the rest, the student's rest, and the ids.

    Returns:
        logq_NJ, logp_NJ with J = K + 1 outcomes, the last being the bucket; rest_NV, the student's
        log-probabilities outside the kept ids, -inf on them; and the ids_NK of the other outcomes, of which
        those with logp -inf are no outcomes. The bucket's log-probability is a log-sum-exp over the rest,
        so an over-confident student loses neither value nor gradient.
    """
    slots = teacher_slots(sparse.ids_NK, sparse.probs_NK.to(logq_NV.dtype), sparse.tail_N, tail)
    unused_NK = slots.p_BK == 0
    kept_NV = torch.zeros_like(logq_NV).scatter_add_(1, slots.ids_BK, (~unused_NK).to(logq_NV.dtype)) > 0
    rest_NV = logq_NV.masked_fill(kept_NV, -torch.inf)
    empty_N1 = kept_NV.all(-1, keepdim=True)
    bucket_N1 = rest_NV.masked_fill(empty_N1, 0.0).logsumexp(-1, keepdim=True)
    bucket_N1 = bucket_N1.masked_fill(empty_N1, -torch.inf)
    logq_NK = logq_NV.gather(1, slots.ids_BK).masked_fill(unused_NK, -torch.inf)
    tail_N1 = slots.tail_B1.to(logq_NV.dtype).masked_fill(empty_N1, 0.0)
    logp_NJ = torch.cat([slots.p_BK, tail_N1], 1).log()
    logq_NJ = torch.cat([logq_NK, bucket_N1], 1)
    # These are all outcomes: their sum is 1, whatever the logits are. In float32 a sum of V terms is off by
    # 1e-6, which shows in a small loss.
    logq_NJ = logq_NJ - logq_NJ.detach().logsumexp(-1, keepdim=True)
    return logq_NJ, logp_NJ, rest_NV, slots.ids_BK


def reference_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    alpha: float,
    objective: Objective,
    gate: Gate | None = None,
    bias_V: Tensor | None = None,
) -> LossSums:
    """The objective summed over valid tokens, holding all [N, V] logits.

    Hidden states and heads are multiplied in float32, whatever their dtype; nothing given is written to.

    Args:
        hidden_ND: student hidden states after the final norm.
        weight_VD: the student's output embedding.
        labels_N: next-token ids, `IGNORE_INDEX` where there is no loss.
        targets: the teacher's distributions for the same tokens; None only with alpha 0.
        alpha: weight of the divergence, in [0, 1].
        objective: divergence, temperature, mixing.
        gate: factor on alpha per token; None for 1.
        bias_V: the bias of the student's head; None for none.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    check_inputs(hidden_ND, weight_VD, labels_N, targets, alpha, objective, bias_V)
    valid_N = labels_N != IGNORE_INDEX
    logits_NV = project(hidden_ND, weight_VD, objective.vocab_size, objective.student_logits, bias_V)
    ce_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORE_INDEX)
    if targets is None:
        loss = ce_N.sum()
        return LossSums(loss, loss.detach().clone(), *(torch.zeros_like(loss) for _ in range(3)))
    d_N, teacher_ce_N, teacher_NV = _divergence(logits_NV, labels_N, targets, objective)
    alpha_N = torch.full_like(ce_N, alpha)
    if gate is not None:
        alpha_N = alpha_N * gate(token_stats(gate, logits_NV, teacher_NV, targets, ce_N, teacher_ce_N))
    ce_weight_N, kd_weight_N = objective.weights(alpha_N)
    kd_N = objective.kd_scale * d_N
    loss_N = ce_weight_N * ce_N + kd_weight_N * kd_N
    sums = [x[valid_N].sum() for x in (loss_N, ce_N, kd_N, teacher_ce_N, alpha_N)]
    return LossSums(sums[0], *(x.detach() for x in sums[1:]))


def _divergence(
    logits_NV: Tensor, labels_N: Tensor, targets: Targets, objective: Objective
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divergence and teacher CE per token, and the teacher's logits where it has them."""
    teacher_NV, sparse = None, targets if isinstance(targets, SparseTargets) else None
    if not isinstance(targets, SparseTargets):
        teacher_NV = dense_logits(targets, slice(None), objective.vocab_size).to(logits_NV.dtype)
        sparse = reduce_targets(teacher_NV, labels_N, objective)
    if sparse is not None:
        sparse, name, tail, t = hardened(sparse, objective)
        logq_NJ, logp_NJ, *_ = buckets((logits_NV / t).log_softmax(-1), sparse, tail)
        return DIVERGENCES[name].value(logq_NJ, logp_NJ, objective.shape), -sparse.gold_logp_N, teacher_NV
    assert teacher_NV is not None  # noqa: S101 - targets are sparse or dense
    t = objective.temperature
    logq_NV, logp_NV = (logits_NV / t).log_softmax(-1), (teacher_NV / t).log_softmax(-1)
    d_N = DIVERGENCES[objective.divergence].value(logq_NV, logp_NV, objective.shape)
    gold_N = teacher_NV.log_softmax(-1).gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    return d_N, -gold_N, teacher_NV
