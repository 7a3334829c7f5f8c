"""Prepare a student's decoder layers before training: what they recompute, and whether they are compiled.

Both happen in place and keep the names of parameters. Recomputation is inside what is compiled, so the
compiler sees it; a layer is sharded after both, and its gathering stays outside.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tutelage.errors import UserError, one_line
from tutelage.models.sharding import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from tutelage.config.runtime_config import RuntimeConfig

_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.linear.default,
    _ATEN._scaled_dot_product_flash_attention.default,  # noqa: SLF001 - the operators have no other names
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
    _ATEN._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    _ATEN._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
    torch.ops.higher_order.flex_attention,
}
"""Matrix products and attention: their results are kept, everything else is cheap to compute again. Products
of experts (`_grouped_mm`) are not among them: models add biases to their results in place."""

_KEPT_NAMESPACES = {"flash_attn", "flash_attn_2", "flash_attn_3"}
"""Of FlashAttention's own operators, which exist once its package is imported."""


def recompute(model: PreTrainedModel, runtime: RuntimeConfig) -> None:
    """Let a student recompute activations of its layers in the backward pass, as `runtime` says.

    Losses and gradients stay the same to the bit: dropout is drawn again from the random state it had.

    Raises:
        UserError: the family cannot.
    """
    kind = runtime.activation_checkpointing
    if kind == "none":
        return
    settings: dict[str, object] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    try:
        _enable(model, settings)
    except ValueError as error:
        raise UserError(
            f"runtime.activation_checkpointing = {kind}: {one_line(error)} Set it to none, or choose another "
            "model"
        ) from None
    model.disable_input_require_grads()  # only adapters on frozen weights need them


def _enable(model: PreTrainedModel, settings: dict[str, object]) -> None:
    """Call the method that lets layers recompute; in transformers 5.20 it has another name."""
    try:
        enable = partial(model.activation_checkpointing_enable, activation_checkpointing_kwargs=settings)
    except AttributeError:
        enable = partial(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs=settings)
    enable()


def _policy(_context: object, operator: object, *_args: object, **_settings: object) -> CheckpointPolicy:
    """Say whether the result of an operator is kept."""
    kept = operator in _KEPT or _namespace(operator) in _KEPT_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _namespace(operator: object) -> str:
    return operator.namespace if isinstance(operator, torch._ops.OpOverload) else ""  # noqa: SLF001


def compile_layers(model: PreTrainedModel, runtime: RuntimeConfig, device: torch.device) -> tuple[str, ...]:
    """Compile the decoder layers of a model in place, if asked to; equal ones share what is compiled.

    Returns:
        A note for the user if compilation was left to the device and does not work there.

    Raises:
        UserError: it was asked for and does not work.
    """
    if not runtime.compiles(device.type):
        return ()
    try:
        _try_compiler(device)
    except Exception as error:  # noqa: BLE001 - a missing compiler or a broken one shows in any way
        first_line = one_line(error).partition(" Set TORCH")[0]
        reason = f"torch.compile does not work on {device.type} here ({first_line})"
        if runtime.compile == "auto":
            return (f"{reason}; training goes on without it",)
        raise UserError(
            f"runtime.compile = true: {reason}; install what it needs, or set it to false"
        ) from None
    for layer in decoder_layers(model):
        layer.compile()
    return ()


def _try_compiler(device: torch.device) -> None:
    """Compile one addition, so that what is missing shows before anything is computed."""
    torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled layers as they are written: every length of a text would be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield
