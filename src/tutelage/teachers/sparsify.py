"""Unbiased sparse stand-ins for a distribution: a few ids with weights whose mean is the distribution.

Vocabularies are walked in two levels: sums and maxima of groups of ids, then the few groups that matter.
Axes beside the shared ones: G groups of the vocabulary, S ids in a group, J fractions sought per position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 128
SLACK = 1e-5
"""Relative. What reaches tau but for this counts as heavy; far above what float32 sums are wrong by, so that
no id spans two points of a systematic sample."""


@dataclass(frozen=True, slots=True)
class Sparsified:
    """K different ids per position, as (heavy probabilities) and (one mass shared equally by the rest).

    Attributes:
        ids_NK: int64; the heavy ones first, by falling probability, then the sampled ones by rising id.
        heavy_N: int64, how many are heavy, 0 to K.
        probs_NK: float64 probabilities of the heavy ids; other slots hold nothing of use.
        light_N: float64, mass of all ids that are not heavy; each sampled id weighs
            light / (K - heavy).
    """

    ids_NK: Tensor
    heavy_N: Tensor
    probs_NK: Tensor
    light_N: Tensor


def min_variance(logits_NV: Tensor, k: int, uniform_N: Tensor) -> Sparsified:
    """Exactly k ids per position, unbiased, with the least summed variance that k weights can have.

    Ids of probability tau and above are kept with their probability. The others are sampled with
    inclusion probability p / tau and weigh tau, which is chosen such that their number is k less the
    heavy ones. One uniform number places the points of a systematic sample: light ids lie side by side
    on a line of length k - heavy, each as long as its inclusion probability, and a point falls into
    every unit of it. (Threshold sampling: Duffield, Lund and Thorup, 2007; the systematic form: Madow, 1949.)

    Fewer than k ids with a probability above 0: all are heavy, with others of probability 0.

    Args:
        logits_NV: float32, divided by the temperature; may be overwritten.
        k: at least 1, at most V.
        uniform_N: float64 in (0, 1), on any device.
    """
    logits_NGS = _grouped(logits_NV)
    top_NK = _largest(logits_NGS, k)  # of logits, which tell ids of probability 0 from those that fill up
    mass_NGS = _softmax(logits_NGS)
    mass_NV = mass_NGS.flatten(1)
    kept_NK = mass_NV.gather(1, top_NK)
    mass_NV.scatter_(1, top_NK, 0.0)
    outside_N1 = mass_NGS.sum(-1).double().sum(-1, keepdim=True)
    # Mass from slot j on, summed from its end: 1 less the rest would lose what a sharp teacher leaves.
    left_NK = kept_NK.double().flip(-1).cumsum(-1).flip(-1) + outside_N1
    slots_K = torch.arange(k, device=logits_NV.device)
    slack_K = torch.where(slots_K < k - 1, SLACK, 0.0)  # a last slot without slack: what is outside stays in
    heavy_NK = kept_NK * (k - slots_K) >= left_NK * (1 - slack_K)
    heavy_NK = heavy_NK.cumprod(-1).bool()
    heavy_N1 = heavy_NK.sum(-1, keepdim=True)
    mass_NV.scatter_(1, top_NK, kept_NK.masked_fill(heavy_NK, 0.0))
    point_NK = slots_K - heavy_N1 + uniform_N.to(logits_NV.device).unsqueeze(1)
    fraction_NK = (point_NK / (k - heavy_N1).clamp(min=1)).masked_fill(heavy_NK, 0.0)
    light_NK = _locate(mass_NGS, fraction_NK)
    left_NJ = torch.cat([left_NK, outside_N1], 1)
    return Sparsified(
        torch.where(heavy_NK, top_NK, light_NK),
        heavy_N1.squeeze(1),
        kept_NK.double() / left_NK[:, :1],
        (left_NJ.gather(1, heavy_N1) / left_NK[:, :1]).squeeze(1),
    )


def multinomial(logits_NV: Tensor, uniform_NJ: Tensor) -> Tensor:
    """One id per uniform number, int64 [N, J], by rising id: draws with replacement from softmax(logits).

    Args:
        logits_NV: float32, divided by the temperature; may be overwritten.
        uniform_NJ: float64 in (0, 1), on any device.
    """
    return _locate(_softmax(_grouped(logits_NV)), uniform_NJ.to(logits_NV.device).sort(-1).values)


def _grouped(logits_NV: Tensor) -> Tensor:
    """[N, G, S]: the vocabulary in groups; the last is filled up with ids of probability 0."""
    if missing := -logits_NV.shape[1] % _GROUP:
        logits_NV = F.pad(logits_NV, (0, missing), value=-torch.inf)
    return logits_NV.view(len(logits_NV), -1, _GROUP)


def _softmax(logits_NGS: Tensor) -> Tensor:
    """Probabilities in the place of the logits."""
    flat_NV = logits_NGS.view(len(logits_NGS), -1)
    torch.softmax(flat_NV, -1, out=flat_NV)
    return logits_NGS


def _largest(logits_NGS: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, by falling logit; they lie in the k groups of largest maximum."""
    groups, size = logits_NGS.shape[1:]
    if k >= groups:
        return logits_NGS.flatten(1).topk(k, dim=-1).indices
    group_NK = logits_NGS.amax(-1).topk(k, dim=-1).indices
    candidates_NKS = logits_NGS.gather(1, group_NK.unsqueeze(2).expand(-1, -1, size))
    place_NK = candidates_NKS.flatten(1).topk(k, dim=-1).indices
    return group_NK.gather(1, place_NK // size) * size + place_NK % size


def _locate(mass_NGS: Tensor, fraction_NJ: Tensor) -> Tensor:
    """The ids at which the running sum of the mass passes the given fractions of the whole.

    An id of no mass is never found, unless there is no mass at all.
    """
    groups, size = mass_NGS.shape[1:]
    if fraction_NJ.shape[1] >= groups:
        return _passed(mass_NGS.flatten(1), fraction_NJ)[0]
    group_NJ, inside_NJ = _passed(mass_NGS.sum(-1), fraction_NJ)
    mass_MS = mass_NGS.gather(1, group_NJ.unsqueeze(2).expand(-1, -1, size)).flatten(0, 1)
    place_M1, _ = _passed(mass_MS, inside_NJ.reshape(-1, 1))
    return group_NJ * size + place_M1.view_as(group_NJ)


def _passed(mass_NM: Tensor, fraction_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum passes a fraction of the whole, and at which fraction of that entry."""
    running_NM = mass_NM.double().cumsum(-1)
    whole_N1 = running_NM[:, -1:].contiguous()
    point_NJ = fraction_NJ * whole_N1
    # Rounding may lift a point to the whole; the last entry with mass is where the whole is reached.
    last_N1 = torch.searchsorted(running_NM, whole_N1)
    index_NJ = torch.minimum(torch.searchsorted(running_NM, point_NJ, right=True), last_N1)
    entry_NJ = mass_NM.gather(1, index_NJ).double()
    start_NJ = running_NM.gather(1, index_NJ) - entry_NJ
    inside_NJ = (point_NJ - start_NJ) / entry_NJ.clamp(min=torch.finfo(torch.float64).tiny)
    return index_NJ, inside_NJ.clamp(0.0, 1.0)
