"""Teachers that compute their targets: a frozen model, or one distribution for every position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tutelage.models.hub import body_and_head, logit_transform
from tutelage.models.packed import body_of, hidden_states
from tutelage.models.sharding import shard_model
from tutelage.objective.products import HALVES, weight_and_bias
from tutelage.types import DenseTargets, MeanTargets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.config.teacher_config import Format
    from tutelage.models.sharding import Sharding
    from tutelage.types import Batch, Targets

Result = TypeVar("Result")


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

    def release(self) -> None:  # noqa: B027 - most hold nothing
        """Free what the targets of a step needed; they are not valid any more."""

    def use(self, work: Callable[[PreTrainedModel], object]) -> None:  # noqa: B027 - most have no model
        """Let a function run or change the model that targets are computed with, if there is one."""

    @abstractmethod
    def targets(self, batch: Batch) -> Targets:
        """Distributions for all B*T positions of `batch`, flattened row by row, without gradient."""
        ...


class OnlineTeacher(Teacher):
    """A causal language model, frozen, in eval mode; on each process whole, or shared by all of them.

    Args:
        model: whose weights have the dtype it computes in; of half precision, under autocast. It may be on
            the meta device yet, to be loaded once it is sharded.
        forward_flops: of its forward pass per token.
        notes: what the user should know about it.
        sharding: how its weights are divided over processes; None: this process has them all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward_flops: float,
        notes: tuple[str, ...] = (),
        sharding: Sharding | None = None,
    ) -> None:
        model.eval().requires_grad_(requires_grad=False)
        self._dtype = model.dtype
        self._head = body_and_head(model)[1]
        self._transform = logit_transform(model)
        self._root = _Root(model)
        if sharding is not None:
            shard_model(model, sharding, self._root)
        self.forward_flops = forward_flops
        self.notes = notes

    @torch.no_grad()
    def targets(self, batch: Batch) -> DenseTargets:
        """Last hidden states and the output embedding; the objective forms logits chunk by chunk.

        A sharded head is gathered by the first micro-batch of a step and stays until `release`.
        """
        half = self._dtype in HALVES
        with torch.autocast(batch.tokens_BT.device.type, self._dtype if half else None, enabled=half):
            hidden_BTE = self._root(lambda model: hidden_states(body_of(model), batch))
        if isinstance(self._head, FSDPModule):  # a head that is the embedding too has come with the root
            self._head.unshard()
        weight_VE, bias_V = weight_and_bias(self._head)
        return DenseTargets(hidden_BTE.flatten(0, 1), weight_VE, self._transform, bias_V)

    def release(self) -> None:
        """Free what was gathered of sharded weights: head, last norm, layers that are kept for the step."""
        if isinstance(self._root, FSDPModule):
            self._root.reset_iter_state()

    @torch.no_grad()
    def use(self, work: Callable[[PreTrainedModel], object]) -> None:
        """Let a function run the model, for example to check it; all processes that share it call this."""
        try:
            self._root(work)
        finally:
            self.release()


class _Root(nn.Module):
    """A model of which every use is one call, around which FSDP2 gathers what belongs to no layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], Result]) -> Result:
        return work(self.model)


class AveragedTeacher(Teacher):
    """The mean of the probabilities of several teachers, each of which runs on every batch.

    Args:
        parts: the teachers, whose targets are whole distributions.
    """

    def __init__(self, parts: Sequence[Teacher]) -> None:
        self._parts = parts
        self.forward_flops = sum(part.forward_flops for part in parts)
        self.notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce the batches to each."""
        for part in self._parts:
            part.prefetch(batches)

    def release(self) -> None:
        """Free what each has gathered."""
        for part in self._parts:
            part.release()

    def use(self, work: Callable[[PreTrainedModel], object]) -> None:
        """Let a function run or change each model."""
        for part in self._parts:
            part.use(work)

    def targets(self, batch: Batch) -> MeanTargets:
        """The distributions of each; the objective forms logits of their mean chunk by chunk."""
        found = [part.targets(batch) for part in self._parts]
        return MeanTargets(tuple(targets for targets in found if isinstance(targets, DenseTargets)))


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
