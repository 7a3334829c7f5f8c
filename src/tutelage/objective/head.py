"""Head and objective as one module, for wrappers that gather a module's parameters when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tutelage.objective.chunked import chunked_objective

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.objective.gates import Gate
    from tutelage.objective.objective import Objective
    from tutelage.types import Targets


class ObjectiveHead(nn.Module):
    """A head that is called for its loss instead of its logits.

    FSDP2 gathers and reduces the parameters of a module around its call. With
    `fully_shard(ObjectiveHead(head, objective), reshard_after_forward=False)` the head is gathered once and
    its gradient reduced once per backward pass, however many chunks there are; the gradient is known
    after the forward pass, so there is nothing to gather again.

    Attributes:
        head: the student's output embedding, without bias. Not to be tied to the input embedding if this
            module is sharded on its own.
        objective: what is minimised.
    """

    def __init__(self, head: nn.Linear, objective: Objective) -> None:
        """Raises ValueError if the head has a bias."""
        super().__init__()
        if "bias" in dict(head.named_parameters()):
            raise ValueError("head: has a bias; the objective knows only bias-free heads")
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
        sums = chunked_objective(hidden_ND, self.head.weight, labels_N, targets, alpha, self.objective, gate)
        # The clone is no view: FSDP2 hangs a hook on what it is given, and a view can lose it.
        return sums.loss.clone(), sums.ce, sums.kd, sums.teacher_ce, sums.taught
