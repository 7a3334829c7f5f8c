"""Compare the names of the weights in a model's files with those of the model that its config.json describes.

Transformers draws what is missing at random and leaves out what has no place; only a log says so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel


def check_names(model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str], name: str) -> None:
    """Check that every weight comes from the files, and that none of a layer or module is left over.

    A model computes nothing with what is no part of it (a value head, a vision tower), nor with buffers of
    older versions: masks, frequencies.

    Args:
        model: with its weights or without.
        missing: names that are in no file.
        unexpected: names in the files that are none of the model's.
        name: begins the message.

    Raises:
        UserError: naming the first of `missing`, or of `unexpected` that is left over.
    """
    if missing := sorted(missing):
        many = "weights are" if len(missing) > 1 else "weight is"
        raise UserError(f"{name}: {len(missing)} {many} missing, for example {missing[0]}")
    unexpected = sorted(unexpected)
    kinds = {_kind(key) for key in model.state_dict()}
    if more := [key for key in unexpected if _kind(key) in kinds]:
        raise UserError(
            f"{name}: config.json speaks of fewer layers than there are weights, for example {more[0]}"
        )
    modules = {_kind(key): bool([*part.parameters(recurse=False)]) for key, part in model.named_modules()}
    left_out = {kind for kind in map(_kind, unexpected) if _belongs(kind, modules)}
    if left := [key for key in unexpected if _kind(key) in left_out]:
        raise UserError(
            f"{name}: config.json describes a model without {left[0]}, and {len(left)} of the weights in its "
            "files would be left out; correct model_type, or the field that adds them, such as attention_bias"
        )


def _belongs(kind: str, modules: Mapping[str, bool]) -> bool:
    """Whether a weight lies beside weights of a module of the model, or is a matrix in one of its layers.

    Args:
        kind: of the weight, with or without the prefix of the base model.
        modules: kinds of the model's modules, and whether they have weights of their own.
    """
    *parents, last = kind.split(".")
    above = [".".join(parents[:length]) for length in range(1, len(parents) + 1)]
    for module, has_weights in modules.items():
        within = [place for place in above if f".{module}".endswith(f".{place}")]
        if has_weights and above and above[-1] in within:
            return True
        if last == "weight" and any(place.endswith("#") for place in within):
            return True
    return False


def _kind(key: str) -> str:
    """Replace the layer number in a weight's name."""
    return re.sub(r"\d+", "#", key)


def check_tied(model: PreTrainedModel, name: str) -> None:
    """Check that weights which config.json ties are tied, as they are unless the files hold two that differ.

    Raises:
        UserError: naming two that are not; begins with `name`.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            raise UserError(two_weights(name, target, source))


def two_weights(name: str, first: str, second: str) -> str:
    """The message that two weights of model `name` are to be one.

    Transformers 5 leaves them apart where it reads whole weights; version 4 and other programs tie them.
    """
    return (
        f"{name}: config.json says that {first} and {second} are one weight (tie_word_embeddings), but the "
        "files hold two that differ; correct it there"
    )


def not_finite(name: str, key: str) -> str:
    """The message that weight `key` of model `name` is damaged."""
    return f"{name}: {key} holds numbers that are not finite (NaN or infinity)"
