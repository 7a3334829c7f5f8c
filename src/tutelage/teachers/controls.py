"""Teachers that know nothing of the context: what they give is smoothing, not knowledge.

If a control helps as much as a real teacher, the real teacher's help was smoothing too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.data.store import token_counts
from tutelage.types import Batch, DenseTargets

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from tutelage.cacheformats import Format


class FixedTeacher:
    """The same distribution at every position, as a width-1 head: hidden state 1, logits log p.

    Args:
        probabilities_V: the distribution; positive, sums to 1.
    """

    def __init__(self, probabilities_V: Tensor) -> None:
        self.vocab_size = probabilities_V.shape[0]
        self.kept: Format | None = None
        self.forward_flops = 0.0
        self.notes: tuple[str, ...] = ()
        self._head_V1 = probabilities_V.double().log().float().unsqueeze(1)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Do nothing: every batch gets the same."""

    def targets(self, batch: Batch) -> DenseTargets:
        """The distribution, once per position."""
        n, device = batch.tokens_BT.numel(), batch.tokens_BT.device
        self._head_V1 = self._head_V1.to(device)
        return DenseTargets(torch.ones(n, 1, device=device), self._head_V1)


def unigram(tokens: np.ndarray, vocab_size: int) -> FixedTeacher:
    """Frequencies of the training tokens, with one added to every count so that none is zero."""
    counts_V = token_counts(tokens, vocab_size) + 1.0
    return FixedTeacher(torch.from_numpy(counts_V / counts_V.sum()))


def uniform(_tokens: np.ndarray, vocab_size: int) -> FixedTeacher:
    """1/V everywhere: the objective becomes label smoothing of strength alpha."""
    return FixedTeacher(torch.full((vocab_size,), 1.0 / vocab_size))
