"""Sparse teacher distributions: truncation, hard labels, tail policies, and the bucket for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tutelage.config.objective_config import TopK
from tutelage.objective.products import wide_dtype
from tutelage.types import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.config.objective_config import Objective

_FIRST_TRY = 256
"""Ids sorted at first; where they do not reach p, eight times as many."""


def truncate(logp_NV: Tensor, k: int | None, p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_NK, probs_NK, tail_N) of what `most_probable` keeps; unused slots have probability 0.

    The tail is summed from what was dropped: 1 minus the kept ones would lose a tail of 1e-9. It is at least
    the smallest number there is: the 0 of a sharp teacher at a low temperature would make reverse KL
    infinite. Together they are made to sum to 1, from which a float32 softmax of many entries is 1e-6 away.
    """
    ids_NK, logp_NK = most_probable(logp_NV, k, p)
    probs_NK, tail_N1 = logp_NK.exp(), logp_NV.exp().scatter_(-1, ids_NK, 0.0).sum(-1, keepdim=True)
    if ids_NK.shape[1] < logp_NV.shape[1]:
        tail_N1 = tail_N1.clamp(min=torch.finfo(tail_N1.dtype).tiny)
    total_N1 = probs_NK.sum(-1, keepdim=True) + tail_N1
    return ids_NK, probs_NK / total_N1, (tail_N1 / total_N1).squeeze(-1)


def most_probable(logp_NV: Tensor, k: int | None, p: float = 1.0) -> tuple[Tensor, Tensor]:
    """(ids_NK, logp_NK) of the most probable ids, by falling probability.

    With p, K is what the token with the flattest distribution needs, and the slots that others do not need
    repeat their first id with log-probability -inf. Only the device knows K, so this waits for the device.

    Args:
        logp_NV: log-probabilities.
        k: most ids to keep per token; None for no such bound.
        p: keep the fewest ids whose mass reaches p (arXiv 1904.09751); 1 keeps all that `k` allows.

    Raises:
        ValueError: k alone decides, and is above the vocabulary.
    """
    vocab = logp_NV.shape[-1]
    if k is not None and p == 1:
        if k > vocab:
            raise ValueError(f"top_k k = {k}: above the vocabulary of {vocab}")
        logp_NK, ids_NK = logp_NV.topk(k, dim=-1)
        return ids_NK, logp_NK
    most = vocab if k is None else min(k, vocab)
    tried = min(_FIRST_TRY, most)
    while True:
        logp_NK, ids_NK = logp_NV.topk(tried, dim=-1)
        p_NK = logp_NK.double().exp()
        # Rounded probabilities may reach 1 before the last id.
        unused_NK = (p_NK.cumsum(-1) - p_NK >= p) & (p < 1)
        unused_NK[:, 0] = False
        used = int((~unused_NK).sum(-1).amax()) if len(unused_NK) else 1
        if used < tried or tried == most:
            break
        tried = min(8 * tried, most)
    ids_NK, logp_NK, unused_NK = ids_NK[:, :used], logp_NK[:, :used], unused_NK[:, :used]
    return torch.where(unused_NK, ids_NK[:, :1], ids_NK), logp_NK.masked_fill(unused_NK, -torch.inf)


def truncate_targets(logits_NV: Tensor, labels_N: Tensor, objective: Objective) -> SparseTargets | None:
    """Dense teacher logits as sparse targets, where the objective truncates or takes hard labels.

    None if all of the vocabulary is kept: as sparse targets, probabilities that underflow would be dropped.
    """
    truncation, t = objective.truncation, objective.temperature
    if objective.divergence == "hard_labels":
        truncation, t = TopK(k=1), 1.0
    if truncation is None:
        return None
    k, p = (truncation.k, 1.0) if isinstance(truncation, TopK) else (None, truncation.p)
    if p == 1 and k in (None, logits_NV.shape[1]):
        return None
    gold_N = logits_NV.log_softmax(-1).gather(1, labels_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    return SparseTargets(*truncate((logits_NV / t).log_softmax(-1), k, p), gold_N, t)


def apply_hard_labels(sparse: SparseTargets, objective: Objective) -> tuple[SparseTargets, Objective]:
    """Express the objective `hard_labels` as forward KL from the most probable id, at T=1; others pass."""
    if objective.divergence != "hard_labels":
        return sparse, objective
    ids_NK, probs_NK = merge_repeats(sparse.ids_NK, sparse.probs_NK)
    largest_N1, top_N1 = probs_NK.max(-1, keepdim=True)
    one_N1 = (largest_N1 > 0).float()  # 0 where the teacher says nothing
    top = SparseTargets(ids_NK.gather(1, top_N1), one_N1, one_N1[:, 0] * 0, sparse.gold_logp_N)
    changes = {"divergence": "forward_kl", "tail": "renormalise", "temperature": 1.0}
    return top, objective.model_copy(update=changes)


def merge_repeats(ids_NK: Tensor, probs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by rising id, with all the probability of an id in its first slot and 0 in its others.

    Probabilities become float32 or wider: they are added here, and divided by their sum later.
    """
    probs_NK = probs_NK.to(wide_dtype(probs_NK))
    ids_NK, order_NK = ids_NK.sort(dim=-1)
    is_first_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    is_first_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    id_number_NK = is_first_NK.cumsum(-1) - 1
    mass_NK = torch.zeros_like(probs_NK).scatter_add_(1, id_number_NK, probs_NK.gather(1, order_NK))
    return ids_NK, mass_NK.gather(1, id_number_NK).masked_fill_(~is_first_NK, 0.0)


class Slots(NamedTuple):
    """Sparse targets of some rows with their tail policy applied.

    Attributes:
        ids_BK: entries by rising id.
        p_BK: their mass; an entry is kept in the one slot in which this is not 0.
        tail_B1: mass of the bucket.
        has_bucket: whether all other entries form one bucket.
    """

    ids_BK: Tensor
    p_BK: Tensor
    tail_B1: Tensor
    has_bucket: bool


def teacher_slots(ids_BK: Tensor, probs_BK: Tensor, tail_B: Tensor, tail: str) -> Slots:
    """Apply a tail policy to the teacher's side; without a bucket the tail mass becomes 0."""
    ids_BK, probs_BK = merge_repeats(ids_BK, probs_BK)
    if tail == "other_bucket":
        return Slots(ids_BK, probs_BK, tail_B.unsqueeze(1), has_bucket=True)
    if tail == "renormalise":
        total_B1 = probs_BK.sum(-1, keepdim=True)
        probs_BK = probs_BK / total_B1.masked_fill(total_B1 == 0, 1.0)
    elif tail != "none":
        raise ValueError(f"tail {tail!r}: must be other_bucket, renormalise or none")
    return Slots(ids_BK, probs_BK, torch.zeros_like(tail_B).unsqueeze(1), has_bucket=False)


def bucketise(logq_NV: Tensor, sparse: SparseTargets, tail: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher over the kept ids and one bucket for the rest.

    The bucket's student log-probability is a log-sum-exp over the rest, so an over-confident student loses
    neither value nor gradient.

    Returns:
        logq_NJ and logp_NJ with J = K + 1 outcomes, the last being the bucket; those with logp -inf are no
        outcomes. rest_NV, the student's log-probabilities outside the kept ids, -inf on them. ids_NK of the
        first K outcomes.
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
