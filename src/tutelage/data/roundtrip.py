"""Whether text comes back from its tokens.

A tokenizer that lower-cases, normalises or knows an unknown token throws something of the text away, and what
is thrown away need not be predicted: bits per byte of such tokens are lower than those of tokens that hold
the whole text, and say less.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tutelage.data.pairs import Piece
    from tutelage.data.sources import Document
    from tutelage.data.tokenize import TextTokenizer

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
