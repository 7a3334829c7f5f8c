"""Encode documents piece by piece, so that no token reaches over the border of a prompt and an answer.

Some tokenizers put a space in front of every text. A piece that follows another is no beginning of a text, so
what stands before it is encoded with it and taken away again: `[/INST]Yes` in two pieces has the ids that it
has as a whole, those that a model is asked with. Where the two would share a token, each is encoded alone.
"""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tutelage.data.tokenizer import TextTokenizer

_LONGEST_END = 256


class Piece(NamedTuple):
    """A part of a document that is encoded by itself, so that no token reaches over its borders.

    Attributes:
        text: its text.
        is_prompt: whether its tokens carry no loss.
        markup: whether special tokens in it are meant as such, because a chat template put them there.
        before: the end of what stands before it in its document: a special token or a character, and white
            space behind it. "" where it begins the document.
    """

    text: str
    is_prompt: bool = False
    markup: bool = False
    before: str = ""


def in_order(pieces: Iterable[Piece], special: tuple[str, ...] = ()) -> tuple[Piece, ...]:
    """Tell every piece of a document what stands before it.

    Args:
        pieces: all pieces of the document.
        special: special tokens that may be meant as such in them.
    """
    found, before = [], ""
    for piece in pieces:
        found.append(piece._replace(before=before))
        end = _last(special).search((before + piece.text)[-_LONGEST_END:])
        before = end[0] if end else ""
    return tuple(found)


@cache
def _last(special: tuple[str, ...]) -> re.Pattern[str]:
    """Match the last special token or character of a text, and white space behind it."""
    return re.compile("(?:" + "|".join((*map(re.escape, special), r"\S")) + r")\s*\Z")


def puts_space_in_front(tokenizer: TextTokenizer) -> bool:
    """Return whether a tokenizer may put a space in front of a text."""
    settings = json.loads(tokenizer.json)
    steps = json.dumps([settings.get("normalizer"), settings.get("pre_tokenizer")])
    return any(f'"{mark}' in steps for mark in ("Prepend", "Metaspace", 'add_prefix_space": true'))


class PieceEncoder:
    """Encodes the pieces of documents.

    Args:
        tokenizer: makes the ids.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._encoders = {markup: tokenizer.encoder(markup=markup) for markup in (False, True)}
        self._looks_back = puts_space_in_front(tokenizer)

    def encode(self, documents: Sequence[Sequence[Piece]]) -> Iterator[list[bytes]]:
        """Yield the ids of every piece of each document, as bytes."""
        pieces = list(itertools.chain(*documents))
        ids = {
            markup: iter(self._encoded([piece for piece in pieces if piece.markup is markup], markup=markup))
            for markup in self._encoders
        }
        for document in documents:
            yield [next(ids[piece.markup]) for piece in document]

    def _encoded(self, pieces: Sequence[Piece], *, markup: bool) -> list[bytes]:
        encode = self._encoders[markup]
        before = [piece.before if self._looks_back else "" for piece in pieces]
        some = sorted({*before} - {""})
        starts = {"": b"", **dict(zip(some, encode(some), strict=True))}
        found = encode([start + piece.text for start, piece in zip(before, pieces, strict=True)])
        joined = [not ids.startswith(starts[start]) for start, ids in zip(before, found, strict=True)]
        alone = iter(
            encode([piece.text for piece, is_joined in zip(pieces, joined, strict=True) if is_joined])
        )
        return [
            next(alone) if is_joined else ids.removeprefix(starts[start])
            for start, ids, is_joined in zip(before, found, joined, strict=True)
        ]
