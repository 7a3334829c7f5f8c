"""Teachers that know nothing of the context: what they give is smoothing, not knowledge.

If a control helps as much as a real teacher, the real teacher's help was smoothing too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from tutelage.data.store import token_counts
from tutelage.models.hub import body_and_head, logit_transform
from tutelage.objective.chunked import weight_and_bias
from tutelage.types import Batch, DenseTargets

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.config.teacher_config import Format
    from tutelage.types import Batch, Targets


class Teacher(Protocol):
    """A frozen teacher; losses never know which kind they have.

    Attributes:
        vocab_size: number of token ids it gives probability to; at least the student's.
        kept: what is kept of its distributions; None if they are whole.
        forward_flops: FLOPs of its forward pass per token, for the cost ledger; 0 if it was paid before.
        notes: what the user should know about it, for example what was assumed.
    """

    vocab_size: int
    kept: Format | None
    forward_flops: float
    notes: tuple[str, ...]

    def expect(self, batches: Sequence[Batch]) -> None:
        """Learn what will be asked for next, so that it can be fetched meanwhile; may do nothing."""

    def targets(self, batch: Batch) -> Targets:
        """Distributions for all B*T positions of `batch`, flattened row by row, without gradient."""
        ...


class OnlineTeacher:
    """A causal language model, frozen, in eval mode; only its hidden states leave it."""

    def __init__(self, model: PreTrainedModel, forward_flops: float, notes: tuple[str, ...] = ()) -> None:
        model.eval().requires_grad_(requires_grad=False)
        self._body, head = body_and_head(model)
        self._weight_VE, self._bias_V = weight_and_bias(head)
        self._transform = logit_transform(model)
        self.vocab_size: int = self._weight_VE.shape[0]
        self.kept: Format | None = None
        self.forward_flops = forward_flops
        self.notes = notes

    def expect(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the forward pass is the step's own work."""

    @torch.no_grad()
    def targets(self, batch: Batch) -> DenseTargets:
        """Last hidden states and the output embedding; logits are formed per chunk by the objective."""
        hidden_BTE = self._body(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
        return DenseTargets(hidden_BTE.flatten(0, 1), self._weight_VE, self._transform, self._bias_V)


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
