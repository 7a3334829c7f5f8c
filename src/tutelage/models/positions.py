"""How long a sequence a model can read, and what it does beyond the length it was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "context_length",
    "seq_length",
    "n_ctx",
)  # most; GPT-2; MPT; RWKV; early BLOOM; CTRL
"""Config fields with the length a model was made for, in tokens."""


def trained_length(config: PretrainedConfig) -> int | None:
    """Positions that a config speaks of; None where the family has no such number (Mamba, BLOOM)."""
    settings = config.get_text_config(decoder=True).to_dict()
    return next((int(settings[field]) for field in _FIELDS if settings.get(field)), None)


@torch.no_grad()
def check_length(model: PreTrainedModel, what: str, length: int) -> str | None:
    """Check that a model can read `length` tokens at once.

    Positions that a model looks up in a table end with the table; rotary and linear ones can be computed
    beyond the trained length, where no model is as good. A model without rotary positions is asked
    for one sequence. Call it while the model is on the CPU: on a GPU, a wrong index ends the process.

    Args:
        model: on the CPU.
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
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        try:
            model.get_decoder()(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        except (IndexError, RuntimeError, ValueError):
            raise UserError(
                f"{what}: it has {limit:,} positions, and sequences of {length:,} tokens are asked for; "
                f"make them no longer than {limit:,}"
            ) from None
    return (
        f"{what}: it was made for sequences of {limit:,} tokens and reads {length:,} here; beyond its length "
        "its predictions can be poor"
    )
