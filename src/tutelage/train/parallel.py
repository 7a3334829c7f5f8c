"""Spread a student over the processes of its run, and steer when its gradients are reduced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from tutelage.errors import UserError
from tutelage.models.sharding import Sharding, shard_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from tutelage.config.runtime_config import ParallelConfig
    from tutelage.train.distributed import World
    from tutelage.train.objective_model import ObjectiveModel, Result
    from tutelage.train.student import Student

_LAYERDROP = ("layerdrop", "decoder_layerdrop")
"""Config fields with the probability that a layer is left out of a forward pass."""


def place(
    module: ObjectiveModel,
    world: World,
    parallel: ParallelConfig,
    dtype: torch.dtype | None,
    fill: Callable[[torch.device], object] | None,
) -> None:
    """Bring a student to the device, or its shards to the devices of all processes, in place.

    Args:
        module: the student, on the CPU, or on the meta device if its weights are to come once it is sharded.
        world: this process among all.
        parallel: whether gathered weights are kept between forward and backward pass.
        dtype: compute dtype where it is not that of the weights.
        fill: gives a student on the meta device weights on another.

    Raises:
        UserError: several processes cannot train a model of this family together.
    """
    if world.mesh is None:
        module.to(world.device)
        return
    _check_same_layers(module.model)
    sharding = Sharding(world.mesh, dtype, parallel.reshard_after_forward)
    shard_model(module.model, sharding, root=module, head=module.head)
    register_fsdp_forward_method(module, "use")
    if fill is not None:
        fill(world.device)


def _check_same_layers(model: PreTrainedModel) -> None:
    """Refuse a model that leaves out layers by chance: each process would gather other ones."""
    settings = model.config.get_text_config(decoder=True).to_dict()
    for field in _LAYERDROP:
        if settings.get(field):
            raise UserError(
                f"{type(model).__name__}: config.json: {field} = {settings[field]}: processes that share the "
                "weights cannot leave out different layers; set it to 0, or train in one process"
            )


def begin_micro_batch(student: Student, *, last: bool) -> None:
    """Say whether the next backward pass is the last of a step, after which gradients are reduced.

    The head (and an embedding that is the head too) is gathered and its gradient reduced once per step. So
    are the layers where each process holds all of a copy's gradients anyway, or is to keep gathered weights.
    Otherwise whole gradients of all layers would stand on every device between micro-batches, so each
    micro-batch is reduced to shards; copies still exchange once.
    """
    module, mesh = student.module, student.world.mesh
    if mesh is None:
        return
    assert isinstance(module, FSDPModule)  # noqa: S101 - `place` made it one
    module.set_is_last_backward(last)
    keep = not student.config.parallel.reshard_after_forward
    if keep or mesh["shard"].size() == 1:
        module.set_requires_gradient_sync(last)
    else:
        module.set_requires_all_reduce(last)
    if keep:
        module.set_reshard_after_backward(last)
    for group in (module, module.head):
        if isinstance(group, FSDPModule):  # a head that is the embedding too belongs to the root
            group.set_requires_gradient_sync(last, recurse=False)
            group.set_reshard_after_backward(last, recurse=False)


@torch.no_grad()
def use_model(module: ObjectiveModel, work: Callable[[PreTrainedModel], Result]) -> Result:
    """Let a function run a student's model between two steps, for example to score it.

    All processes have to call this, with functions that run the same forward passes. Layers are gathered
    while they run; head, last norm and a tied embedding are whole tensors meanwhile.
    """
    if not isinstance(module, FSDPModule):
        return module.use(work)

    def with_head(model: PreTrainedModel) -> Result:
        if isinstance(module.head, FSDPModule):
            module.head.unshard()
        return work(model)

    try:
        return module.use(with_head)
    finally:
        module.reset_iter_state()  # no backward pass follows, which would free what is gathered
