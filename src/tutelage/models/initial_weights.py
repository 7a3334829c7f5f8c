"""Draw the random weights of a shape one tensor at a time, the same numbers that `hub.build` draws at once.

A sharded model is filled with them by every process, which keeps its part of each tensor: the largest tensor
is the most that stands whole in memory, and the weights do not depend on how many processes there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.models import hub
from tutelage.models.sharding import fill, materialise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.models.shapes import ModelShape


def fill_model(
    model: PreTrainedModel, shape: ModelShape, vocab_size: int, context: int, seed: int, device: torch.device
) -> None:
    """Give a model on the meta device, sharded or not, memory on `device` and what `hub.build` draws for it.

    Args:
        model: `hub.build` of the same arguments on the meta device, sharded since.
        shape: as in `hub.build`.
        vocab_size: as in `hub.build`.
        context: as in `hub.build`.
        seed: as in `hub.build`.
        device: where it is trained.
    """
    materialise(model, device)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    draw_weights(shape, vocab_size, context, seed, lambda name, value: fill(tensors[name], value))


def draw_weights(
    shape: ModelShape, vocab_size: int, context: int, seed: int, take: Callable[[str, Tensor], None]
) -> None:
    """Draw what `hub.build` of the same arguments has on the CPU, and hand over tensor after tensor.

    One generator gives the numbers of all tensors one after the other, so all have to be drawn. Its state
    is left as it was.

    Args:
        shape: what is built.
        vocab_size: as in `hub.build`.
        context: as in `hub.build`.
        seed: as in `hub.build`.
        take: called with the name and the value of every parameter (a tied one once, by its first name) and
            every buffer; the tensor is freed when it returns.
    """
    model = hub.build(shape, vocab_size, context, seed, device="meta")
    wanted = dict.fromkeys([*dict(model.named_parameters()), *dict(model.named_buffers())])
    begun: set[nn.Module] = set()

    def keep(name: str, value: Tensor) -> None:
        if name in wanted:
            take(name, value)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # transformers makes and initialises the body before it makes the head and initialises that.
        for part in (model.get_decoder(), model):
            new = {name: module for name, module in model.named_modules() if module in set(part.modules())}
            modules = {name: module for name, module in new.items() if module not in begun}
            begun.update(modules.values())
            for module in modules.values():
                _construct(module)
            for name, module in modules.items():
                _initialise(model, name, module, keep)


def _construct(module: nn.Module) -> None:
    """Draw the numbers that torch gives a layer when it is made, which transformers overwrites later."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.to_empty(device=torch.device("cpu"), recurse=False)
        module.reset_parameters()
        module.to_empty(device=torch.device("meta"), recurse=False)


def _initialise(
    model: PreTrainedModel, name: str, module: nn.Module, take: Callable[[str, Tensor], None]
) -> None:
    """Let transformers initialise one module, without those inside it, and hand its tensors over."""
    module.to_empty(device=torch.device("cpu"), recurse=False)
    model._init_weights(module)  # noqa: SLF001 - the one place where a family says how it begins
    for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        take(f"{name}.{key}" if name else key, value.detach())
    module.to_empty(device=torch.device("meta"), recurse=False)
