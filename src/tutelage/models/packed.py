"""Read packed sequences with a model, whole or document by document, and check how long they may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from tutelage.errors import UserError, one_line
from tutelage.types import Batch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_FIRST, _SECOND = 5, 7
"""Tokens of the two documents that a model is tried on."""


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Find the part of a causal language model that is everything but its head.

    Where transformers does not find it (of Llama 4 its `get_decoder` gives the whole model, of ModernBERT's
    decoder the head), it is the part that is a model of its own.
    """
    found: PreTrainedModel = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        return found
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), found)


def freeze_beside(model: PreTrainedModel) -> None:
    """Freeze what a model has besides body and head, such as a vision tower: text does not reach it.

    Of processes that share the weights, each sends zeros where it has no gradient, and by these the weights
    would decay.
    """
    parts = (body_of(model), model.get_output_embeddings())
    used = {weight for part in parts for weight in part.parameters()}
    for weight in model.parameters():
        if weight not in used:
            weight.requires_grad_(requires_grad=False)


def hidden_states(body: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute a body's hidden states after the final norm, [B, T, D].

    If the batch has positions, a token sees its own document only, and its position in it.
    """
    if batch.positions_BT is None:
        return _read(body, batch.tokens_BT)
    if _is_flash(body):
        # FlashAttention knows documents as pieces of a single row; every row of the batch begins with one.
        row_1N, positions_1N = batch.tokens_BT.reshape(1, -1), batch.positions_BT.reshape(1, -1)
        hidden_1ND = _read(body, row_1N, position_ids=positions_1N, **_pieces(positions_1N))
        return hidden_1ND.view(*batch.tokens_BT.shape, -1)
    # The shape, dtype and device of embeddings are read, not their values. Not every family would find the
    # documents by their positions, so the masks are given to it.
    like = next(body.parameters())
    shape_BT0 = torch.empty(*batch.tokens_BT.shape, 0, dtype=like.dtype, device=batch.tokens_BT.device)
    masks = create_masks_for_generate(body.config, shape_BT0, None, None, batch.positions_BT)
    return _read(body, batch.tokens_BT, position_ids=batch.positions_BT, attention_mask=masks)


@torch.no_grad()
def check_documents(body: PreTrainedModel, what: str, length: int) -> None:
    """Check that a model can keep documents apart: no family is known by name, two documents are tried.

    The second must not depend on the first, which ends where the longest can, and must read as it does alone.

    Args:
        body: as `tutelage.models.hub.body_and_head` gives it, on any device.
        what: begins the message.
        length: tokens of a sequence, for which the model has positions.

    Raises:
        UserError: it cannot, as Mamba, whose state goes on, BLOOM, whose positions are distances, and Phi-3,
            where a document beyond its original length turns the rotary positions of all in a batch.
    """
    family, training = type(body).__name__, body.training
    device = next(body.parameters()).device
    first_T, second_T = torch.arange(_FIRST), torch.arange(_SECOND)
    first_T[1:] += max(0, length - _FIRST)
    places_T = torch.cat([first_T, second_T]).to(device).unsqueeze(0)
    tokens_T = torch.arange(1, _FIRST + _SECOND + 1, device=device).unsqueeze(0)
    tokens_T = tokens_T % body.get_input_embeddings().num_embeddings
    other_T = torch.cat([tokens_T[:, -_FIRST:], tokens_T[:, _FIRST:]], 1)
    body.eval()
    try:
        packed_TD, changed_TD = (
            hidden_states(body, Batch(ids, ids, (0,), places_T))[0, _FIRST:] for ids in (tokens_T, other_T)
        )
        alone_TD = _read(body, tokens_T[:, _FIRST:])[0]
    except Exception as error:  # noqa: BLE001 - a family that takes no masks shows it in any way
        raise UserError(_refusal(what, family, one_line(error))) from None
    finally:
        body.train(training)
    rounding = 1e-5 if alone_TD.dtype.itemsize > 2 else 1e-2  # noqa: PLR2004 - bytes of half precision
    limit = rounding * float(alone_TD.float().norm())
    if max(float((x - alone_TD).float().norm()) for x in (packed_TD, changed_TD)) > limit:
        raise UserError(_refusal(what, family, "one document changes the next"))


def _refusal(what: str, family: str, reason: str) -> str:
    return (
        f"{what}: {family} cannot keep the documents of a packed sequence apart ({reason}); set the document "
        "mask to false, for the student and its teacher's cache, or choose another model"
    )


def _read(body: PreTrainedModel, tokens_BT: Tensor, **more: Any) -> Tensor:  # noqa: ANN401 - arguments of transformers
    hidden_BTD: Tensor = body(input_ids=tokens_BT, use_cache=False, **more).last_hidden_state
    return hidden_BTD


def _is_flash(body: PreTrainedModel) -> bool:
    return str(body.config._attn_implementation).startswith("flash_attention")  # noqa: SLF001


def _pieces(positions_1N: Tensor) -> dict[str, Any]:
    """Where documents begin, as FlashAttention's arguments: found once, not by every layer."""
    begins_P = (positions_1N[0] == 0).nonzero()[:, 0]
    bounds_P = F.pad(begins_P, (0, 1), value=positions_1N.shape[1]).to(torch.int32)
    longest = int(bounds_P.diff().max())
    return {
        "cu_seq_lens_q": bounds_P,
        "cu_seq_lens_k": bounds_P,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
