"""Compare the tokenizer of a model with that of a token store, by one rule for every use.

An id must stand for the same string on both sides; a model may know more ids than the store uses. A
tokenizer with other merges, normaliser or pre-tokenizer over the same vocabulary cuts text into other
tokens, and one with other tokens in front of a text begins documents differently, but each token is still the
string it stands for: for a teacher or a start model that is a note, because nothing can be done about it; for
text that is to be scored it is an error, because the store can be built again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tutelage.data.chat import chat_template
from tutelage.data.tokenizer import (
    added_to_texts,
    download_tokenizer,
    has_tokenizer,
    named_tokens,
    tokenizer_json,
)
from tutelage.errors import UserError, one_line
from tutelage.hub_access import INSTEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tutelage.data.store import Store

_SETTINGS = (
    "ignore_merges",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "max_input_chars_per_word",
    "dropout",
)
"""Fields of a tokenizer.json's model, besides its vocabulary and merges, that decide how it cuts text."""
_UNKNOWN = "\U00013000\U00013001"
"""Hieroglyphs, which vocabularies have as bytes or not at all."""


def compare_tokenizers(what: str, tokenizer: str, store: Store, *, same_cuts: bool) -> str | None:
    """Compare a tokenizer with that of a token store.

    Args:
        what: begins the message.
        tokenizer: the text of a tokenizer.json.
        store: the token store.
        same_cuts: refuse a tokenizer that cuts text into other tokens, because the store's text is scored.

    Returns:
        A note if the ids are the same but text is cut differently, else None.

    Raises:
        UserError: an id of the store means another string, or nothing, and the message names the first; or
            text is cut differently and `same_cuts` is set.
    """
    stored = tokenizer_json(store.path)
    if tokenizer == stored:
        return None
    own, theirs = _strings(what, tokenizer), _strings(str(store.path), stored)
    for index in sorted(theirs):
        if own.get(index) != theirs[index]:
            meaning = repr(own[index]) if index in own else "nothing"
            raise UserError(
                f"{what}: its tokenizer differs from that of {store.path}: id {index} is {meaning} in the "
                f"first and {theirs[index]!r} in the second; they must share one: build {store.path.name} "
                "again with the first (tokenizer.path)"
            )
    different = _different_cuts(json.loads(tokenizer), json.loads(stored))
    if not different:
        return None
    note = (
        f"{what}: its tokenizer has the ids of {store.path} but other {' and '.join(different)}, so "
        "it learned from text that became tokens otherwise"
    )
    if same_cuts:
        raise UserError(f"{note}; build the store with this tokenizer (tokenizer.path)")
    return note


def check_rows(what: str, ids: int, rows: int) -> None:
    """Refuse a tokenizer of more ids than its model has."""
    if ids > rows:
        raise UserError(
            f"{what}: its tokenizer has {ids:,} ids, the model knows {rows:,}; the tokenizer belongs to "
            "another model"
        )


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """The tokenizer of a model that was found to fit a store.

    Attributes:
        directory: local directory with its files, or without any if the model has none.
        is_the_stores: whether it has the store's ids and cuts text as the store's does.
        ids: one more than its largest id; 0 if the model has none.
        notes: what the user should know.
    """

    directory: Path
    is_the_stores: bool
    ids: int
    notes: tuple[str, ...]

    def check_rows(self, what: str, rows: int, store: Store) -> None:
        """Refuse a model of `rows` ids that are fewer than its tokenizer's or the store's."""
        check_rows(what, self.ids, rows)
        if rows < store.vocab_size:  # more are padded rows, which the objective leaves out
            raise UserError(
                f"{what}: its vocabulary has {rows:,} entries, the token store's has {store.vocab_size:,}; "
                "they must share a tokenizer (build the store with tokenizer.path)"
            )


def check_model_tokenizer(
    what: str,
    model: str,
    store: Store,
    *,
    revision: str | None = None,
    assume: bool = False,
    setting: str | None,
) -> ModelTokenizer:
    """Find the tokenizer of a model, in a directory or on the Hub, and compare it with that of a token store.

    Args:
        what: begins every message, for example "teacher PATH".
        model: directory or Hub name.
        store: the token store.
        revision: commit or tag on the Hub.
        assume: take a model without a tokenizer to have the store's.
        setting: name of the setting that says so; None where there is none.

    Raises:
        UserError: the tokenizers differ, or the model has none and `assume` is not set.
    """
    place = Path(model)
    or_set = f", or set {setting}: true if you know it" if setting is not None else ""
    if not place.exists():
        instead = INSTEAD + (f"{or_set} to be that of {store.path}" if or_set else "")
        begin = f"{what}: its tokenizer"
        place = download_tokenizer(begin, model, revision, needed=not assume, instead=instead)
    if not has_tokenizer(place):
        if not assume:
            raise UserError(
                f"{what}: it has no tokenizer, so it is not known whether its ids mean what those of "
                f"{store.path} mean; put its tokenizer.json beside it{or_set}"
            )
        note = f"{what}: has no tokenizer; its ids are assumed to be those of {store.path} ({setting})"
        return ModelTokenizer(place, is_the_stores=False, ids=0, notes=(note,))
    text = tokenizer_json(place)
    different = compare_tokenizers(what, text, store, same_cuts=False)
    return ModelTokenizer(
        place,
        is_the_stores=different is None,
        ids=max(_strings(what, text)) + 1,
        notes=(*([] if different is None else [different]), *_other_habits(what, place, store.path)),
    )


def _other_habits(what: str, model: Path, store: Path) -> Iterator[str]:
    """Say where a model ends texts, or writes conversations, otherwise than a store does."""
    end, stored = (named_tokens(place).get("eos_token") for place in (model, store))
    if None not in (end, stored) and end != stored:
        yield f"{what}: it ends texts with {end!r}, and those of {store} end with {stored!r}"
    own, written = chat_template(model), chat_template(store)
    if None not in (own, written) and own != written:
        yield f"{what}: its chat template is not the one by which {store} was written"


def _strings(where: str, tokenizer: str) -> dict[int, str]:
    """Return the string of every id."""
    try:
        vocabulary = Tokenizer.from_str(tokenizer).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for bad JSON
        reason = one_line(error)
        raise UserError(f"{where}: tokenizer.json is not one ({reason})") from None
    return {index: token for token, index in vocabulary.items()}


def _different_cuts(own: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of the parts that decide how text is cut and differ."""
    own_model, model = own["model"], theirs["model"]
    own_special, special = _special(own), _special(theirs)
    ready, stored = (Tokenizer.from_str(json.dumps(one)) for one in (own, theirs))
    same_kind = own_model.get("type") == model.get("type")
    steps = {"normalizer": "normalizer", "pre-tokenizer": "pre_tokenizer"}
    differs = {part: _cutting(own.get(step)) != _cutting(theirs.get(step)) for part, step in steps.items()}
    lacks_alike = any(differs.values()) or _ids_of_unknown(ready) == _ids_of_unknown(stored)
    differs |= {
        "kind of model": not same_kind,
        "merges": same_kind and _merges(own_model) != _merges(model),
        "scores of words": same_kind and _other_scores(own_model, model),
        "settings of the model": same_kind and _model_settings(own_model) != _model_settings(model),
        "special tokens": any(own_special.get(token, flag) != flag for token, flag in special.items()),
        "added words": any(
            not flag and token not in others
            for tokens, others in ((own_special, special), (special, own_special))
            for token, flag in tokens.items()
        ),
        "ids for characters that it lacks": not lacks_alike,
        "tokens in front of a text": added_to_texts(ready)[1] != added_to_texts(stored)[1],
    }
    return [part for part, is_other in differs.items() if is_other]


def _cutting(step: object) -> object:
    """Return a step without the settings that concern only the places of tokens in the text."""
    if isinstance(step, dict):
        return {name: _cutting(value) for name, value in step.items() if name != "trim_offsets"}
    return [_cutting(part) for part in step] if isinstance(step, list) else step


def _merges(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the merges in order; a file has them as pairs or as strings with a space between."""
    merges = model.get("merges") or []
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _other_scores(own: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two Unigram models have other words or scores, by which they cut; others have no scores.

    The library changes last digits of scores whenever it reads and writes a file.
    """
    if not (isinstance(own["vocab"], list) and isinstance(theirs["vocab"], list)):
        return False
    pairs = zip(own["vocab"], theirs["vocab"], strict=False)
    same = all(word == other and isclose(score, value) for (word, score), (other, value) in pairs)
    return len(own["vocab"]) != len(theirs["vocab"]) or not same


def _ids_of_unknown(tokenizer: Tokenizer) -> list[int] | None:
    """Return what two characters become that no vocabulary has; None if they are refused."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    try:
        return tokenizer.encode(_UNKNOWN, add_special_tokens=False).ids
    except Exception:  # noqa: BLE001 - the library raises nothing narrower where it has no token for them
        return None


def _model_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Return what else decides how a model cuts text; older files lack what is off."""
    spells_bytes = "<0x00>" in dict(model["vocab"])
    names = (*_SETTINGS, "byte_fallback") if spells_bytes else _SETTINGS
    return {name: model[name] for name in names if model.get(name)}


def _special(tokenizer: dict[str, Any]) -> dict[str, bool]:
    """Return the added tokens, and whether each is special; the others are looked for in every text."""
    return {token["content"]: token["special"] for token in tokenizer.get("added_tokens") or []}
