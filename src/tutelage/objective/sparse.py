"""Teacher distributions cut down to a few ids: top-k and top-p, and ids that are kept twice made one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the teacher's k largest probabilities.

    Attributes:
        k: at least 1, at most the vocabulary.
    """

    k: int

    def __post_init__(self) -> None:
        check_count("top_k k", self.k)

    def keep(self, logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_NK, logp_NK) of the kept entries; raises ValueError if k is above the vocabulary."""
        if self.k > logp_NV.shape[-1]:
            raise ValueError(f"top_k k = {self.k}: above the vocabulary of {logp_NV.shape[-1]}")
        logp_NK, ids_NK = logp_NV.topk(self.k, dim=-1)
        return ids_NK, logp_NK


@dataclass(frozen=True, slots=True)
class TopP:
    """Keep the smallest set of ids whose mass reaches p (Holtzman et al., arXiv 1904.09751).

    Attributes:
        p: in (0, 1]; 1 keeps every id.
        largest: most ids to keep per token, even if their mass is below p then; None for no such bound.
    """

    p: float
    largest: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"top_p p = {self.p}: must be above 0 and at most 1")
        if self.largest is not None:
            check_count("top_p largest", self.largest)

    def keep(self, logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_NK, logp_NK); unused slots repeat the first id with log-probability -inf.

        K is what the token with the flattest distribution needs. Only the device knows it, so this waits
        for the device.
        """
        vocab = logp_NV.shape[-1]
        most = vocab if self.largest is None else min(self.largest, vocab)
        tried = min(_FIRST_TRY, most)
        while True:
            logp_NK, ids_NK = logp_NV.topk(tried, dim=-1)
            p_NK = logp_NK.double().exp()
            # Rounded probabilities may reach 1 before the last id.
            unused_NK = (p_NK.cumsum(-1) - p_NK >= self.p) & (self.p < 1)
            unused_NK[:, 0] = False
            used = int((~unused_NK).sum(-1).amax()) if len(unused_NK) else 1
            if used < tried or tried == most:
                break
            tried = min(8 * tried, most)
        ids_NK, logp_NK, unused_NK = ids_NK[:, :used], logp_NK[:, :used], unused_NK[:, :used]
        return torch.where(unused_NK, ids_NK[:, :1], ids_NK), logp_NK.masked_fill(unused_NK, -torch.inf)


_FIRST_TRY = 256
"""Ids sorted at first; where they do not reach p, eight times as many."""


def check_count(name: str, count: int) -> None:
    """Raise ValueError unless the setting is a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} = {count}: must be a whole number of at least 1")


Truncation = TopK | TopP


def truncate(logp_NV: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_NK, probs_NK, tail_N) of a teacher's log-probabilities; the tail is summed from what was dropped.

    Summing the dropped probabilities, rather than taking 1 minus the kept ones, keeps a tail of 1e-9 exact.
    Together they are made to sum to 1, from which a float32 softmax of many entries is 1e-6 away.
    """
    ids_NK, logp_NK = truncation.keep(logp_NV)
    probs_NK, tail_N1 = logp_NK.exp(), logp_NV.exp().scatter_(-1, ids_NK, 0.0).sum(-1, keepdim=True)
    total_N1 = probs_NK.sum(-1, keepdim=True) + tail_N1
    return ids_NK, probs_NK / total_N1, (tail_N1 / total_N1).squeeze(-1)


def merge_repeats(ids_NK: Tensor, probs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by rising id, with all the probability of an id in its first slot and 0 in its others."""
    ids_NK, order_NK = ids_NK.sort(dim=-1)
    is_first_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    is_first_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    id_number_NK = is_first_NK.cumsum(-1) - 1
    mass_NK = torch.zeros_like(probs_NK).scatter_add_(1, id_number_NK, probs_NK.gather(1, order_NK))
    return ids_NK, mass_NK.gather(1, id_number_NK).masked_fill_(~is_first_NK, 0.0)
