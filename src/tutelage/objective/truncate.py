"""Teacher distributions cut down to a few ids: top-k and top-p, and hard labels as top-1."""

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
        if self.k < 1:
            raise ValueError(f"top_k k = {self.k}: must be at least 1")

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
        p: in (0, 1].
        largest: most ids to keep per token, which bounds memory.
    """

    p: float
    largest: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"top_p p = {self.p}: must be above 0 and at most 1")
        if self.largest < 1:
            raise ValueError(f"top_p largest = {self.largest}: must be at least 1")

    def keep(self, logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_NK, logp_NK); unused slots repeat the first id with log-probability -inf."""
        logp_NK, ids_NK = logp_NV.topk(min(self.largest, logp_NV.shape[-1]), dim=-1)
        before_NK = logp_NK.exp().cumsum(-1) - logp_NK.exp()
        unused_NK = before_NK >= self.p
        unused_NK[:, 0] = False
        return torch.where(unused_NK, ids_NK[:, :1], ids_NK), logp_NK.masked_fill(unused_NK, -torch.inf)


Truncation = TopK | TopP


def truncate(logp_NV: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_NK, probs_NK, tail_N) of a teacher's log-probabilities; the tail is summed from what was dropped.

    Summing the dropped probabilities, rather than taking 1 minus the kept ones, keeps a tail of 1e-9 exact.
    """
    ids_NK, logp_NK = truncation.keep(logp_NV)
    dropped_NV = logp_NV.exp().scatter_(-1, ids_NK, 0.0)
    return ids_NK, logp_NK.exp(), dropped_NV.sum(-1)
