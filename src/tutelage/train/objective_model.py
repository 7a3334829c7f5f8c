"""A student's model with the objective around it: called with a batch, it gives loss sums.

One call runs the whole forward pass. That is what FSDP2 asks for, which gathers and frees weights around the
calls of modules, and one process runs the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from tutelage.models import hub
from tutelage.models.packed import body_of, hidden_states
from tutelage.objective import NotFiniteError
from tutelage.objective.chunked import ObjectiveHead
from tutelage.objective.gates import TokenStats
from tutelage.train.guard import damaged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.config.objective_config import Objective
    from tutelage.objective import Gate
    from tutelage.types import Batch, Targets

Result = TypeVar("Result")


class ObjectiveModel(nn.Module):
    """A model, and its head wrapped so that it returns losses.

    Attributes:
        model: the causal language model.
        head: its output embedding with the objective.
        autocast: compute dtype where weights stay float32 and are cast operation by operation; None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        vocab_size: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Raise UserError if the head is more than a linear layer.

        Args:
            model: the causal language model.
            objective: what is minimised.
            vocab_size: entries of the token store's vocabulary; the head may have more rows.
            autocast: compute dtype where weights stay float32; None for none.
        """
        super().__init__()
        _, head = hub.body_and_head(model)
        self.model = model
        self.head = _Head(head, objective, hub.logit_transform(model), vocab_size)
        self.autocast = autocast

    def forward(
        self, batch: Batch, targets: Targets | None, alpha: float, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of `LossSums` over the valid tokens of a micro-batch, in their order.

        An input of the objective that is not finite makes losses that are not, and no error: processes that
        share the weights have to go through the same backward pass.
        """
        device, half = batch.tokens_BT.device.type, self.autocast
        with torch.autocast(device, dtype=half, enabled=half is not None):
            hidden_BTD = hidden_states(body_of(self.model), batch)
        hidden_ND = hidden_BTD.flatten(0, 1)
        if half is not None:
            hidden_ND = hidden_ND.to(half)
        sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = self.head(
            hidden_ND, batch.labels_BT.flatten(), targets, alpha, gate
        )
        return sums

    def use(self, work: Callable[[PreTrainedModel], Result]) -> Result:
        """Give the model to a function that runs it; where weights are shared, see `parallel.use_model`."""
        return work(self.model)


class _Head(ObjectiveHead):
    """Gives losses that are not finite where its inputs are not."""

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        targets: Targets | None,
        alpha: float,
        gate: Gate | None = None,
        token_weights_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        try:
            return super().forward(hidden_ND, labels_N, targets, alpha, gate, token_weights_N)
        except NotFiniteError as error:  # the guard skips the update; the other ranks wait for our gradients
            if gate is not None and targets is not None:
                gate(TokenStats(*[hidden_ND.new_zeros(0)] * 5))  # and for its counts
            sums = damaged(error, (hidden_ND, *self.head.parameters()))
            return sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha
