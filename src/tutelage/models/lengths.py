"""Lengths of sequences that a model was made for, and whether it can read longer ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.errors import UserError
from tutelage.models.packed import body_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "seq_length", "n_ctx")
# most; GPT-2; MPT; RWKV; early BLOOM; CTRL
"""Config fields with the length a model was made for, in tokens."""


def trained_length(config: PretrainedConfig) -> int | None:
    """Read the trained sequence length from a config; None where a family has none (Mamba, BLOOM)."""
    settings = config.get_text_config(decoder=True).to_dict()
    return next((int(settings[field]) for field in _LENGTHS if settings.get(field)), None)


@torch.no_grad()
def check_length(model: PreTrainedModel, what: str, length: int) -> str | None:
    """Check that a model can read `length` tokens at once.

    Position tables have an end; rotary and linear positions can be computed beyond the trained length, with
    worse predictions. A model without rotary positions is run on one sequence, on the CPU: on a GPU, a wrong
    index ends the process. One without weights, which are yet to be sharded, cannot be tried: it is taken to
    have no positions beyond its length.

    Args:
        model: on the CPU, or on the meta device.
        what: begins the message.
        length: tokens.

    Returns:
        A note for the user if the length is beyond what the model was made for, else None.

    Raises:
        UserError: the model has no positions there.
    """
    limit = trained_length(model.config)
    if limit is None or length <= limit:
        return None
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    if not rotary and not _reads(model, length):
        raise UserError(
            f"{what}: it has {limit:,} positions, and sequences of {length:,} tokens are asked for; "
            f"make them no longer than {limit:,}"
        )
    return (
        f"{what}: it was made for sequences of {limit:,} tokens and reads {length:,} here; beyond its length "
        "its predictions can be poor"
    )


def _reads(model: PreTrainedModel, length: int) -> bool:
    """Whether a model runs on `length` tokens."""
    if model.device.type == "meta":
        return False
    try:
        body_of(model)(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True
