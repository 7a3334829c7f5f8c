"""Relate the tokens of a document to its source text.

`SourceBytes` counts the bytes of the source that each token stands for, without decoding any token. Decoding
does not give a text back where a tokenizer has an unknown token or a normalizer, or where a document is cut
within a character. Sums of these counts are bytes of the source, whatever the tokenizer: all tokens of a text
together stand for all of it.

A token stands for the text from the end of the token before it to its own end, so text that a tokenizer
drops (white space, often) belongs to the token after it, and at the end of the text to the last token. Of a
character that several tokens share, a token that is made of bytes (byte-level vocabularies, byte fallback)
takes the bytes it is made of, any other takes none, and the last of them takes what is left.

Special tokens that a chat template wrote are no text: they stand for no bytes, between turns as at the end of
a document, so that the bytes of an answer do not depend on how many turns there were before it.

`RoundTrip` finds the documents whose text differs after decoding.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tutelage.data.pieces import Piece
    from tutelage.data.sources import Document
    from tutelage.data.tokenizer import TextTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN = -1
_SHOWN = 30


class SourceBytes:
    """Counts bytes of the source text per token, for one tokenizer.

    Args:
        tokenizer: the tokenizer the ids were made with.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        settings = json.loads(tokenizer.json)
        self._text_tokenizer = tokenizer
        self._own_V = _own_bytes(settings, tokenizer.vocab_size)
        self._lossless = settings.get("normalizer") is None
        self._marks = _marks(settings, tokenizer)
        self._aligned: dict[bool, Tokenizer] = {}

    def count(self, piece: Piece, ids_N: NDArray[Any]) -> NDArray[np.uint32]:
        """Count the bytes of UTF-8 per token, uint32 [N].

        Args:
            piece: what was encoded.
            ids_N: its ids.
        """
        counts_N = self._count(piece, ids_N)
        return np.where(np.isin(ids_N, self._marks), np.uint32(0), counts_N) if piece.markup else counts_N

    def _count(self, piece: Piece, ids_N: NDArray[Any]) -> NDArray[np.uint32]:
        """Count the bytes per token, those of special tokens too."""
        text = piece.text
        own_N = self._own_V[ids_N]
        size = len(text.encode())
        if self._lossless and (own_N != _UNKNOWN).all() and own_N.sum() == size:
            return np.asarray(own_N, np.uint32)  # the tokens spell the text, byte for byte
        tokenizer = self._tokenizer(markup=piece.markup)
        for before in (piece.before, ""):  # as `PieceEncoder` has it: alone only where it has to be
            encoding = tokenizer.encode(before + text, add_special_tokens=False)
            start = len(encoding.ids) - len(ids_N)
            if encoding.ids[max(0, start) :] == ids_N.tolist():
                break
        else:
            raise AssertionError("a tokenizer encoded the same text otherwise")
        offsets_N2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)[start:] - len(before)
        if piece.markup:  # what a tokenizer drops at the end of an answer is none of the mark that follows
            last = np.flatnonzero(np.isin(ids_N, self._marks)[1:])
            offsets_N2[last, 1] = np.maximum(offsets_N2[last, 1], offsets_N2[last + 1, 0])
        return _from_offsets(text, np.maximum(offsets_N2, 0), own_N)

    def _tokenizer(self, *, markup: bool) -> Tokenizer:
        """Return the tokenizer, changed so that its offsets are those of whole tokens."""
        if markup not in self._aligned:
            tokenizer = self._text_tokenizer.library(markup=markup)
            tokenizer.post_processor = None  # that of byte-level tokenizers trims spaces off the offsets
            self._aligned[markup] = tokenizer
        return self._aligned[markup]


def _marks(settings: dict[str, Any], tokenizer: TextTokenizer) -> list[int]:
    """Return the ids of special tokens, but for those that stand for unknown text and its bytes."""
    model, vocabulary = settings["model"], tokenizer.library(markup=True).get_vocab(with_added_tokens=True)
    unknown = vocabulary.get(model.get("unk_token") or "", model.get("unk_id"))  # the latter is of Unigram
    marks = (token for token in tokenizer.special_tokens if not _BYTE.fullmatch(token))
    ids = [vocabulary[token] for token in marks if token in vocabulary]
    return [number for number in ids if number != unknown]


def _own_bytes(settings: dict[str, Any], vocab_size: int) -> NDArray[np.int64]:
    """Return the bytes that each id is made of, where its vocabulary is one of bytes; else -1."""
    own_V = np.full(vocab_size, _UNKNOWN, np.int64)
    byte_level = '"type": "ByteLevel"' in json.dumps(settings.get("decoder"))
    byte_fallback = bool(settings["model"].get("byte_fallback"))
    vocabulary = settings["model"]["vocab"]
    if isinstance(vocabulary, list):  # of Unigram: (token, score) in the order of ids
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    for token, number in vocabulary.items():
        if byte_level:
            own_V[number] = len(token)
        elif byte_fallback and _BYTE.fullmatch(token):
            own_V[number] = 1
    for added in settings.get("added_tokens", []):
        own_V[added["id"]] = len(added["content"].encode())
    return own_V


def _from_offsets(text: str, offsets_N2: NDArray[np.int64], own_N: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Compute bytes per token from the characters that each token covers."""
    if not len(own_N):
        return np.zeros(0, np.uint32)
    size_of_character = [len(character.encode()) for character in text]
    byte_of_character = np.concatenate([[0], np.cumsum(size_of_character, dtype=np.int64)])
    starts_N, ends_N = offsets_N2.T
    reached_N = np.maximum.accumulate(ends_N)
    next_N = np.append(np.minimum.accumulate(starts_N[::-1])[::-1][1:], len(text))
    ends = byte_of_character[np.minimum(reached_N, next_N)]
    ends[-1] = byte_of_character[-1]
    for i in np.flatnonzero(reached_N > next_N):  # the next token shares this one's last character
        done = ends[i - 1] if i else 0
        ends[i] = np.clip(done + max(0, own_N[i]), ends[i], byte_of_character[reached_N[i]])
    return np.asarray(np.diff(ends, prepend=0), np.uint32)


class RoundTrip:
    """Finds documents whose text does not come back from their tokens.

    A space at the beginning of a piece, or beside the special tokens of a chat template, does not count: many
    tokenizers put one there and take one away.

    Args:
        tokenizer: made the tokens.

    Attributes:
        example: how the first such document is decoded; None if there is none so far.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.example: str | None = None
        settings = json.loads(tokenizer.json)
        self._is_exact = is_exact(tokenizer)
        self._tokenizer = Tokenizer.from_str(tokenizer.json)
        self._dtype = tokenizer.dtype
        special = [re.escape(token["content"]) for token in settings["added_tokens"] if token["special"]]
        self._space = re.compile(f" *({'|'.join(special)}) *") if special else None

    def changed(self, documents: Sequence[Document], ids: Sequence[Sequence[bytes]]) -> list[bool]:
        """Return for each document whether its text differs after decoding.

        Args:
            documents: the documents that were encoded.
            ids: ids of every piece of each document, as bytes.
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
            # of what follows another piece, decoding takes a space away that nobody has put there
            if before != after and not (piece.before and after == before.removeprefix(" ")):
                changed = True
                self.example = self.example or _difference(before, after)
        return changed

    def _comparable(self, text: str, *, markup: bool) -> str:
        if markup and self._space is not None:
            text = self._space.sub(r"\1", text)
        return text.removeprefix(" ")


def is_exact(tokenizer: TextTokenizer) -> bool:
    """Whether every text survives by construction: byte-level BPE with all bytes, and nothing before it."""
    match json.loads(tokenizer.json):
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
    """Show the first place where two texts differ, from a few characters before it."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - _SHOWN // 3)
    return f"{before[start : start + _SHOWN]!r} comes back as {after[start : start + _SHOWN]!r}"
