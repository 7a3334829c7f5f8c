"""Describe next-token distributions, and the differences between two of them, token by token.

Every quantity is one float32 or integer per row. If a vocabulary is smaller than a K below, K is its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_TOP5, _TOP10, _TOP50 = 5, 10, 50


@dataclass(frozen=True, slots=True)
class Predictions:
    """Next-token distributions of one model at N positions, float32.

    Attributes:
        logp_NV: natural log-probabilities.
        p_NV: probabilities.
        top_ids_NK: ids of the 50 most probable tokens, the most probable first.
    """

    logp_NV: Tensor
    p_NV: Tensor
    top_ids_NK: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor) -> Predictions:
        """From logits, float32."""
        logp_NV = logits_NV.log_softmax(1)
        top_ids_NK = logits_NV.topk(min(_TOP50, logits_NV.shape[1])).indices
        return cls(logp_NV, logp_NV.exp(), top_ids_NK)


def alone(of: Predictions, gold_N: Tensor) -> dict[str, Tensor]:
    """Quantities of one model.

    Args:
        of: its predictions.
        gold_N: int64 ids of the actual tokens.

    Returns:
        entropy: nats, 0 to log V.
        max_prob: largest probability.
        gold_logp: log-probability of the gold token, nats.
        gold_rank: 1 plus the number of tokens with a larger probability than the gold one.
        above_uniform: number of tokens with a probability above 1/V.
        top10_mass, top50_mass: sum of the 10 and 50 largest probabilities.
    """
    gold_logp_N1 = of.logp_NV.gather(1, gold_N[:, None])
    top_NK = of.p_NV.gather(1, of.top_ids_NK)
    return {
        "entropy": -torch.linalg.vecdot(of.p_NV, of.logp_NV),
        "max_prob": top_NK[:, 0],
        "gold_logp": gold_logp_N1[:, 0],
        "gold_rank": 1 + (of.logp_NV > gold_logp_N1).sum(1),
        "above_uniform": (of.logp_NV > -math.log(of.logp_NV.shape[1])).sum(1),
        "top10_mass": top_NK[:, :_TOP10].sum(1),
        "top50_mass": top_NK.sum(1),
    }


def kl_both_ways(p: Predictions, q: Predictions) -> tuple[Tensor, Tensor]:
    """KL(p || q) and KL(q || p) in nats."""
    difference_NV = p.logp_NV - q.logp_NV
    return torch.linalg.vecdot(p.p_NV, difference_NV), -torch.linalg.vecdot(q.p_NV, difference_NV)


def together(p: Predictions, q: Predictions) -> dict[str, Tensor]:
    """Quantities of two models that are symmetric in them.

    Returns:
        js: Jensen-Shannon divergence, nats, 0 to log 2.
        top1_agreement: 1 where the most probable token is the same, else 0.
        top5_overlap: share of the 5 most probable tokens that both have, 0 to 1.
        top10_spearman: `spearman` over the 10 most probable tokens of both, -1 to 1.
        shared_mass: sum of min(p, q), 0 to 1; one minus the total variation distance.
    """
    fives = p.top_ids_NK[:, :_TOP5, None] == q.top_ids_NK[:, None, :_TOP5]
    tens_NK = torch.cat([p.top_ids_NK[:, :_TOP10], q.top_ids_NK[:, :_TOP10]], 1)
    return {
        "js": _js(p, q),
        "top1_agreement": (p.top_ids_NK[:, 0] == q.top_ids_NK[:, 0]).float(),
        "top5_overlap": fives.sum((1, 2)) / fives.shape[1],
        "top10_spearman": spearman(p.logp_NV, q.logp_NV, tens_NK),
        "shared_mass": torch.minimum(p.p_NV, q.p_NV).sum(1),
    }


def _js(p: Predictions, q: Predictions) -> Tensor:
    """Mean KL from the mean distribution; not as a difference of entropies, which would cancel."""
    mean_NV = (p.p_NV + q.p_NV).div_(2)
    logm_NV = mean_NV.clamp_(min=torch.finfo(mean_NV.dtype).tiny).log_()  # both may underflow: 0 log 0
    from_p_N: Tensor = torch.linalg.vecdot(p.p_NV, p.logp_NV - logm_NV)
    from_q_N: Tensor = torch.linalg.vecdot(q.p_NV, q.logp_NV - logm_NV)
    return (from_p_N + from_q_N) / 2


def spearman(logp_NV: Tensor, logq_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Rank correlation of p and q over the different ids of each row; ties share their mean rank.

    The ids are the union of both models' most probable tokens, so that the value is symmetric. Tokens that
    only one of them ranks high lower it: that of two unrelated models is negative. NaN where either gives
    all ids the same probability.
    """
    ids_NK = ids_NK.sort(1).values
    new_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    new_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    p_NK = _centred_ranks(logp_NV.gather(1, ids_NK), new_NK)
    q_NK = _centred_ranks(logq_NV.gather(1, ids_NK), new_NK)
    return (p_NK * q_NK).sum(1) / (p_NK.square().sum(1) * q_NK.square().sum(1)).sqrt()


def _centred_ranks(values_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Mean ranks among the valid values of a row, minus their average; 0 where not valid.

    A value's rank, up to a constant, is half of (values below it minus values above it).
    """
    difference_NKK = values_NK[:, :, None] - values_NK[:, None, :]
    return (difference_NKK.sign() * valid_NK[:, None, :]).sum(2) * valid_NK / 2
