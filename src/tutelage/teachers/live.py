"""Teachers that compute their targets: a frozen model, or one distribution for every position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from tutelage.models.hub import body_and_head, logit_transform
from tutelage.models.packed import hidden_states
from tutelage.objective.products import HALVES, weight_and_bias
from tutelage.types import DenseTargets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.config.teacher_config import Format
    from tutelage.types import Batch, Targets


class Teacher(ABC):
    """A frozen teacher; losses do not depend on which kind it is.

    Attributes:
        retained: what a cache has retained of its distributions; None if they are whole.
        forward_flops: FLOPs of its forward pass per token; 0 if there is none or a cache has paid it.
        notes: what the user should know about it, for example what was assumed.
    """

    retained: Format | None = None
    forward_flops: float = 0.0
    notes: tuple[str, ...] = ()

    def prefetch(self, batches: Sequence[Batch]) -> None:  # noqa: B027 - most have nothing to fetch
        """Announce the batches of the next step, so that their targets can be read meanwhile."""

    @abstractmethod
    def targets(self, batch: Batch) -> Targets:
        """Distributions for all B*T positions of `batch`, flattened row by row, without gradient."""
        ...


class OnlineTeacher(Teacher):
    """A causal language model, frozen, in eval mode.

    Args:
        model: whose weights have the dtype it computes in; of half precision, under autocast.
        forward_flops: of its forward pass per token.
        notes: what the user should know about it.
    """

    def __init__(self, model: PreTrainedModel, forward_flops: float, notes: tuple[str, ...] = ()) -> None:
        model.eval().requires_grad_(requires_grad=False)
        self._dtype = model.dtype
        self._body, head = body_and_head(model)
        self._weight_VE, self._bias_V = weight_and_bias(head)
        self._transform = logit_transform(model)
        self.forward_flops = forward_flops
        self.notes = notes

    @torch.no_grad()
    def targets(self, batch: Batch) -> DenseTargets:
        """Last hidden states and the output embedding; the objective forms logits chunk by chunk."""
        half = self._dtype in HALVES
        with torch.autocast(batch.tokens_BT.device.type, self._dtype if half else None, enabled=half):
            hidden_BTE = hidden_states(self._body, batch)
        return DenseTargets(hidden_BTE.flatten(0, 1), self._weight_VE, self._transform, self._bias_V)


class FixedTeacher(Teacher):
    """The same distribution at every position, as a width-1 head: hidden state 1, logits log p.

    Args:
        probabilities_V: the distribution; positive, sums to 1.
    """

    def __init__(self, probabilities_V: Tensor) -> None:
        self._head_V1 = probabilities_V.double().log().float().unsqueeze(1)

    def targets(self, batch: Batch) -> DenseTargets:
        """The distribution, once per position."""
        n, device = batch.tokens_BT.numel(), batch.tokens_BT.device
        self._head_V1 = self._head_V1.to(device)
        return DenseTargets(torch.ones(n, 1, device=device), self._head_V1)
