"""Whether a model and a token store mean the same by an id: the one comparison of tokenizers.

An id must stand for the same string on both sides. A model may know more ids than the store uses. A tokenizer
with other merges, normaliser or pre-tokenizer over the same vocabulary cuts text into other tokens, and one
with other tokens in front of a text begins documents otherwise, but each token is the string it stands for:
for a teacher or a start model that is a note, because nothing can be done about it; for a text that is to be
scored it is an error, because the store can be built again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from tutelage.data.tokenizer import added_to_texts, download_tokenizer, has_tokenizer, tokenizer_json
from tutelage.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tutelage.data.chat import Piece
    from tutelage.data.sources import Document
    from tutelage.data.store import Store
    from tutelage.data.tokenizer import TextTokenizer

_SHOWN = 30


class RoundTrip:
    """Finds documents whose text does not come back from their tokens.

    A space at the beginning of a piece, or beside the special tokens of a chat template, does not count: many
    tokenizers put one there and take one away.

    Args:
        tokenizer: made the tokens.

    Attributes:
        example: how the first such document comes back; None while there is none.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.example: str | None = None
        settings = json.loads(tokenizer.json)
        self._is_exact = _is_exact(settings)
        self._tokenizer = Tokenizer.from_str(tokenizer.json)
        self._dtype = tokenizer.dtype
        special = [re.escape(token["content"]) for token in settings["added_tokens"] if token["special"]]
        self._space = re.compile(f" *({'|'.join(special)}) *") if special else None

    def changed(self, documents: Sequence[Document], ids: Sequence[Sequence[bytes]]) -> list[bool]:
        """Whether the text of each document is another after decoding.

        Args:
            documents: what was encoded.
            ids: of every piece of every document, as bytes.
        """
        if self._is_exact:
            return [False] * len(documents)
        rows = [np.frombuffer(piece, self._dtype).tolist() for pieces in ids for piece in pieces]
        texts = iter(self._tokenizer.decode_batch(rows, skip_special_tokens=False))
        return [self._is_changed(document.pieces, texts) for document in documents]

    def _is_changed(self, pieces: Sequence[Piece], texts: Iterator[str]) -> bool:
        """Compare the pieces of one document with as many of the decoded texts."""
        changed = False
        for piece, text in zip(pieces, texts, strict=False):
            before, after = (self._comparable(version, markup=piece.markup) for version in (piece.text, text))
            if before != after:
                changed = True
                self.example = self.example or _difference(before, after)
        return changed

    def _comparable(self, text: str, *, markup: bool) -> str:
        if markup and self._space is not None:
            text = self._space.sub(r"\1", text)
        return text.removeprefix(" ")


def _is_exact(tokenizer: dict[str, object]) -> bool:
    """Whether any text comes back by construction: byte-level BPE with every byte, and nothing before it."""
    match tokenizer:
        case {
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel"},
            "decoder": {"type": "ByteLevel"},
            "added_tokens": [*added],
            "model": {"type": "BPE", "vocab": {**vocabulary}, **model},
        }:
            only_special = all(isinstance(token, dict) and token["special"] for token in added)
            marks = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
            return (
                only_special
                and not any(marks)
                and set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)
            )
    return False


def _difference(before: str, after: str) -> str:
    """The first place where two texts part, from a few characters before it on."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - _SHOWN // 3)
    return f"{before[start : start + _SHOWN]!r} comes back as {after[start : start + _SHOWN]!r}"


_CUTS = ("normalizer", "pre_tokenizer")


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
        if rows < store.vocab_size:  # above are padded rows, which the objective leaves out
            raise UserError(
                f"{what}: its vocabulary has {rows:,} entries, the token store's has {store.vocab_size:,}; "
                "they must share a tokenizer (build the store with tokenizer.path)"
            )


def check_rows(what: str, ids: int, rows: int) -> None:
    """Refuse a tokenizer of more ids than its model has."""
    if ids > rows:
        raise UserError(
            f"{what}: its tokenizer has {ids:,} ids, the model knows {rows:,}; the tokenizer belongs to "
            "another model"
        )


def check_model_tokenizer(
    what: str,
    model: str,
    store: Store,
    *,
    revision: str | None = None,
    assume: bool = False,
    setting: str,
) -> ModelTokenizer:
    """Compare the tokenizer of a model, a directory or a name on the Hub, with that of a token store.

    Args:
        what: begins every message, for example "teacher PATH".
        model: directory or Hub name.
        store: the text.
        revision: commit or tag on the Hub.
        assume: take a model without a tokenizer to have the store's.
        setting: name of the setting that says so.

    Raises:
        UserError: the tokenizers differ, or the model has none and `assume` is not set.
    """
    place = Path(model) if Path(model).exists() else download_tokenizer(what, model, revision)
    if not has_tokenizer(place):
        if not assume:
            raise UserError(
                f"{what}: it has no tokenizer, so it is not known whether its ids mean what those of "
                f"{store.path} mean; put its tokenizer.json beside it, or set {setting}: true if you know it"
            )
        note = f"{what}: has no tokenizer; its ids are assumed to be those of {store.path} ({setting})"
        return ModelTokenizer(place, is_the_stores=False, ids=0, notes=(note,))
    text = tokenizer_json(place)
    different = compare_tokenizers(what, text, store)
    return ModelTokenizer(
        place,
        is_the_stores=different is None,
        ids=max(_strings(what, text)) + 1,
        notes=() if different is None else (different,),
    )


def compare_tokenizers(what: str, tokenizer: str, store: Store) -> str | None:
    """Compare a tokenizer with that of a token store.

    Args:
        what: begins the message.
        tokenizer: the text of a tokenizer.json.
        store: the text.

    Returns:
        A note if the same ids are used but text is cut into them otherwise, else None.

    Raises:
        UserError: an id of the store means another string, or nothing; the message names the first.
    """
    stored = tokenizer_json(store.path)
    if tokenizer == stored:
        return None
    own, theirs = _strings(what, tokenizer), _strings(str(store.path), stored)
    for index in sorted(theirs):
        if own.get(index) != theirs[index]:
            meaning = repr(own[index]) if index in own else "nothing"
            raise UserError(
                f"{what}: its tokenizer differs from that of {store.path}: id {index} is {meaning} there and "
                f"{theirs[index]!r} here; they must share one (build the store with tokenizer.path)"
            )
    different = _different_cuts(json.loads(tokenizer), json.loads(stored))
    if not different:
        return None
    return (
        f"{what}: its tokenizer has the ids of {store.path} but other {' and '.join(different)}, so "
        "it learned from text that became tokens otherwise"
    )


def check_text_tokenizer(what: str, tokenizer: str, store: Store) -> None:
    """Refuse a text that is to be scored and was not cut as the model cuts it.

    Raises:
        UserError: an id means another string, or text is cut otherwise.
    """
    if (note := compare_tokenizers(what, tokenizer, store)) is not None:
        raise UserError(f"{note}; build the store with this tokenizer (tokenizer.path)")


def _strings(where: str, tokenizer: str) -> dict[int, str]:
    """The string of every id."""
    try:
        vocabulary = Tokenizer.from_str(tokenizer).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for bad JSON
        reason = one_line(error)
        raise UserError(f"{where}: tokenizer.json is not one ({reason})") from None
    return {index: token for token, index in vocabulary.items()}


def _different_cuts(own: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What decides how text is cut and differs."""
    found = [
        field.replace("_", "-") for field in _CUTS if _cutting(own.get(field)) != _cutting(theirs.get(field))
    ]
    models = [tokenizer["model"] for tokenizer in (own, theirs)]
    if models[0].get("type") != models[1].get("type"):
        found.append("kind of model")
    elif _merges(models[0]) != _merges(models[1]):
        found.append("merges")
    special = [_special(tokenizer) for tokenizer in (own, theirs)]
    if any(special[0].get(token, flag) != flag for token, flag in special[1].items()):
        found.append("special tokens")
    begins = [added_to_texts(Tokenizer.from_str(json.dumps(tokenizer)))[1] for tokenizer in (own, theirs)]
    if begins[0] != begins[1]:
        found.append("tokens in front of a text")
    return found


def _cutting(step: object) -> object:
    """A step without what only concerns the places of tokens in the text."""
    if isinstance(step, dict):
        return {name: _cutting(value) for name, value in step.items() if name != "trim_offsets"}
    return [_cutting(part) for part in step] if isinstance(step, list) else step


def _merges(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """Merges in order; a file has them as pairs or as strings with a space between."""
    merges = model.get("merges") or []
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _special(tokenizer: dict[str, Any]) -> dict[str, bool]:
    return {token["content"]: token["special"] for token in tokenizer.get("added_tokens") or []}
