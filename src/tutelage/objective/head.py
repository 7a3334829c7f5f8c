"""Heads as modules: what of one the objective may use, and a head that is called for its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tutelage.objective.chunked import chunked_objective

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.objective.gates import Gate
    from tutelage.objective.objective import Objective
    from tutelage.types import Targets


def weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] of a head and its bias [V] or None, for a head that is no more than these.

    Raises:
        ValueError: it computes something else as well, which would be left out in silence: an adapter (LoRA),
            quantised weights, another layer.
    """
    parameters = dict(head.named_parameters())
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain or parameters.keys() - {"weight", "bias"}:
        raise ValueError(
            f"head {type(head).__module__}.{type(head).__name__}: must be a linear layer and no more; merge "
            "an adapter (LoRA) into it, or leave the head out of the adapter's target modules"
        )
    return parameters["weight"], parameters.get("bias")


class ObjectiveHead(nn.Module):
    """A head that is called for its loss instead of its logits.

    FSDP2 gathers and reduces the parameters of a module around its call. With
    `fully_shard(ObjectiveHead(head, objective), reshard_after_forward=False)` the head is gathered once and
    its gradient reduced once per backward pass, however many chunks there are; the gradient is known
    after the forward pass, so there is nothing to gather again.

    Attributes:
        head: the student's output embedding, a linear layer. Not to be tied to the input embedding if this
            module is sharded on its own.
        objective: what is minimised.
    """

    def __init__(self, head: nn.Linear, objective: Objective) -> None:
        """Raises ValueError if the head is more than a linear layer."""
        super().__init__()
        weight_and_bias(head)
        self.head = head
        self.objective = objective

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        targets: Targets | None,
        alpha: float,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields of `LossSums` in their order, as a tuple because FSDP2 looks for tensors in tuples.

        Raises:
            ValueError: as `chunked_objective` does.
        """
        weight_VD, bias_V = weight_and_bias(self.head)
        sums = chunked_objective(hidden_ND, weight_VD, labels_N, targets, alpha, self.objective, gate, bias_V)
        return sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.taught
