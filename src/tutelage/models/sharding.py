"""Shard a causal language model over a mesh of processes with PyTorch's FSDP2, layer by layer.

Students and teachers are sharded by the same functions. A group of parameters is what is gathered, used and
reduced together: every decoder layer is one, the input embedding and the head are one each, and what is left
(the last norm, position tables, an embedding that is the head too) belongs to the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tutelage.errors import UserError
from tutelage.models.packed import body_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder layers of a model, in the order in which they are run.

    Raises:
        UserError: the family keeps its layers in no list.
    """
    body = body_of(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in body.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    if not lists:
        raise UserError(
            f"{type(model).__name__}: it has no list of decoder layers, so it cannot be sharded, compiled or "
            "recomputed by layer; use one process and no activation checkpointing"
        )
    return max(lists.values(), key=lambda found: sum(weight.numel() for weight in found.parameters()))


@dataclass(frozen=True, slots=True)
class Sharding:
    """How models are sharded.

    Attributes:
        mesh: processes by copy ("replicate") and part of a copy ("shard").
        dtype: of gathered weights and of what is computed with them; None is that of the shards.
        reshard_after_forward: free a layer's gathered weights after its forward pass, and gather them again
            for the backward pass.
    """

    mesh: DeviceMesh
    dtype: torch.dtype | None
    reshard_after_forward: bool

    def apply(self, module: nn.Module, *, reshard_after_forward: bool | None = None) -> FSDPModule:
        """Shard the parameters of a module that are in no group yet, as one group.

        Gradients are summed over all processes, not averaged: a loss is a sum over the tokens of one.

        Args:
            module: what to shard, in place.
            reshard_after_forward: in place of the general setting.
        """
        reshard = self.reshard_after_forward if reshard_after_forward is None else reshard_after_forward
        sharded = fully_shard(
            module,
            # A single copy has nothing to exchange with others.
            mesh=self.mesh if self.mesh["replicate"].size() > 1 else self.mesh["shard"],
            reshard_after_forward=reshard,
            # Inputs are left alone: targets are to stay float32, and hidden states have their dtype already.
            mp_policy=MixedPrecisionPolicy(
                self.dtype, None if self.dtype is None else torch.float32, cast_forward_inputs=False
            ),
            # A head that is wrapped is found by two ways.
            ignored_params={weight for weight in module.parameters() if isinstance(weight, DTensor)},
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # or the factor becomes an operation gloo lacks
        # What one process has used another need not have: zeros are sent, so that all send the same.
        sharded.set_reduce_scatter_unused_params(True, recurse=False)
        return sharded


def shard_model(
    model: PreTrainedModel, sharding: Sharding, root: nn.Module | None = None, head: nn.Module | None = None
) -> None:
    """Shard a model in place, whose parameters keep their names and become `DTensor`s.

    A model on the meta device stays there until `materialise`. Every forward pass has to begin with a call
    of the root. An embedding that is the head too is gathered by the root's call and
    stays until the end of the backward pass, so that both uses are gathered and reduced once.

    Args:
        model: what to shard.
        sharding: how.
        root: a module around the model whose call runs all of it; default: the model.
        head: a module around the output embedding that is called in its place.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    for layer in decoder_layers(model):
        sharding.apply(layer)
    if embedding.weight is not output.weight:
        group = sharding.apply(embedding)
        if len([*embedding.parameters()]) == 1:  # Inkling's has a norm in it
            group.set_unshard_in_backward(False)  # the gradient of a table needs only the ids
        # The backward pass begins with the head, so there is nothing to gain from gathering it again.
        sharding.apply(head or output, reshard_after_forward=False)
    sharding.apply(root or model, reshard_after_forward=False)


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model on the meta device, sharded or not, memory on another, without values; ties are kept."""
    model.to_empty(device=device)
    for target, source in model.all_tied_weights_keys.items():
        parent, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(source))


def own_rows(weight: Tensor) -> slice:
    """The rows of a weight of at least one dimension that this process holds: all, of one not sharded."""
    rows = weight.shape[0]
    if not isinstance(weight, DTensor):
        return slice(0, rows)
    axis, mesh = weight.placements.index(Shard(0)), weight.device_mesh
    size, start = Shard.local_shard_size_and_offset(rows, mesh.size(axis), mesh.get_local_rank(axis))
    start = min(start, rows)
    return slice(start, start + size)


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it, into a parameter or buffer.

    Args:
        target: a `DTensor` that is sharded in its first dimension, or a plain tensor.
        whole: of the target's global shape, on any device.
    """
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    target.to_local().copy_(whole[own_rows(target)])


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Gather a tensor on the CPU, if it is sharded; every process has to take part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
