"""A teacher that runs its own forward pass on every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.models.hub import body_and_head, logit_transform
from tutelage.objective.head import weight_and_bias
from tutelage.types import Batch, DenseTargets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from tutelage.cacheformats import Format


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
