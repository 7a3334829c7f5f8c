"""Count the bytes of the source text that every token stands for, without decoding any token.

Decoding does not give a text back where a tokenizer has an unknown token or a normalizer, or where a
document is cut within a character. Sums of these counts are bytes of the source, whatever the tokenizer:
all tokens of a text together stand for all of it.

A token stands for the text from the end of the token before it to its own end, so text that a tokenizer
drops (white space, often) belongs to the token after it, and at the end of the text to the last token. Of a
character that several tokens share, a token that is made of bytes (byte-level vocabularies, byte fallback)
takes the bytes it is made of, any other takes none, and the last of them takes what is left.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from tutelage.data.tokenizer import TextTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN = -1


class SourceBytes:
    """Bytes of the source text per token, for one tokenizer.

    Args:
        tokenizer: the tokenizer the ids were made with.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        settings = json.loads(tokenizer.json)
        self._text_tokenizer = tokenizer
        self._own_V = _own_bytes(settings, tokenizer.vocab_size)
        self._lossless = settings.get("normalizer") is None
        self._aligned: dict[bool, Tokenizer] = {}

    def count(self, text: str, ids_N: NDArray[Any], *, markup: bool = False) -> NDArray[np.uint32]:
        """Bytes of UTF-8 per token, uint32 [N].

        Args:
            text: what was encoded.
            ids_N: its ids.
            markup: whether special tokens in `text` are meant as such.
        """
        own_N = self._own_V[ids_N]
        size = len(text.encode())
        if self._lossless and (own_N != _UNKNOWN).all() and own_N.sum() == size:
            return np.asarray(own_N, np.uint32)  # the tokens spell the text, byte for byte
        encoding = self._tokenizer(markup=markup).encode(text, add_special_tokens=False)
        assert np.array_equal(encoding.ids, ids_N), "a tokenizer encoded the same text otherwise"  # noqa: S101
        return _from_offsets(text, np.array(encoding.offsets, np.int64).reshape(-1, 2), own_N)

    def _tokenizer(self, *, markup: bool) -> Tokenizer:
        """The tokenizer, so that its offsets are those of whole tokens."""
        if markup not in self._aligned:
            tokenizer = self._text_tokenizer.library(markup=markup)
            tokenizer.post_processor = None  # that of byte-level tokenizers trims spaces off the offsets
            self._aligned[markup] = tokenizer
        return self._aligned[markup]


def _own_bytes(settings: dict[str, Any], vocab_size: int) -> NDArray[np.int64]:
    """Bytes that each id is made of, where its vocabulary is one of bytes; else -1."""
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
    """Bytes per token out of the characters that each token covers."""
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
