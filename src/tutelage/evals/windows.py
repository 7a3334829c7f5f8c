"""Documents of a split cut into windows that a model can read, in batches of windows of like length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer

from tutelage.types import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor

    from tutelage.data.store import Store
    from tutelage.types import Split

FORWARD_TOKENS = 4096
"""Tokens, padding included, that go through the model at once (or one window, if that is longer)."""


@dataclass(frozen=True, slots=True)
class Document:
    """What is scored of one document.

    Attributes:
        index: its place in the split.
        tokens_N: int64 ids, without the end-of-text mark.
        size: UTF-8 bytes of the scored text.
    """

    index: int
    tokens_N: np.ndarray
    size: int


@dataclass(frozen=True, slots=True)
class Block:
    """Some windows, padded on the right to the longest of them.

    Attributes:
        inputs_BT: int64 ids; padding is 0, which nothing before it sees.
        labels_BT: int64 ids; `IGNORE_INDEX` where nothing is scored.
        documents_BT: the place, in the list of documents, of the document of each label.
        places_BT: which token of its document a label is.
    """

    inputs_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor
    places_BT: Tensor


def read_documents(
    store: Store, split: Split, max_documents: int, max_tokens: int, skip: Collection[int] = ()
) -> list[Document]:
    """The first documents of a split, each up to `max_tokens` tokens from its beginning, without empty ones.

    Args:
        store: where they are.
        split: "validation" or "test".
        max_documents: how many.
        max_tokens: of each.
        skip: places in the split to pass over.
    """
    view = store.split(split)
    starts, sizes = view.offsets[:, 0].astype(np.int64), np.diff(view.offsets[:, 1].astype(np.int64))
    chosen = [i for i in range(len(sizes)) if starts[i + 1] - starts[i] > 1 and i not in skip]
    documents, cut = [], []
    for i in chosen[:max_documents]:
        end = min(starts[i + 1] - 1, starts[i] + max_tokens)
        tokens_N = np.asarray(view.tokens[starts[i] : end], dtype=np.int64)
        documents.append(Document(i, tokens_N, int(sizes[i])))
        cut.append(end < starts[i + 1] - 1)
    return _with_cut_sizes(documents, cut, store)


def _with_cut_sizes(documents: list[Document], cut: list[bool], store: Store) -> list[Document]:
    """The same, where the store's index does not know the bytes because only the beginning is scored."""
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    short = [document.tokens_N.tolist() for document, was in zip(documents, cut, strict=True) if was]
    texts = iter(tokenizer.decode_batch(short, skip_special_tokens=False))
    return [
        Document(document.index, document.tokens_N, len(next(texts).encode())) if was else document
        for document, was in zip(documents, cut, strict=True)
    ]


def blocks(documents: Sequence[Document], eos_id: int, context: int, stride: int) -> Iterator[Block]:
    """Every token of every document as a label exactly once, in batches of windows of like length.

    A window holds at most `context` tokens. The first starts with the end-of-text mark; each further one
    scores the next `stride` tokens with the `context - stride` tokens before them as context only.

    Args:
        documents: what to score.
        eos_id: id of the end-of-text mark, from which the first token is predicted.
        context: window length in tokens.
        stride: 1 to `context`; `context` means windows that do not overlap.
    """
    windows = [
        window
        for owner, document in enumerate(documents)
        for window in _windows(owner, len(document.tokens_N), context, stride)
    ]
    windows.sort(key=lambda window: window[1] - window[2])  # longest first, so that memory fails early
    at = 0
    while at < len(windows):
        length = windows[at][2] - windows[at][1]
        rows = max(1, FORWARD_TOKENS // length)
        yield _block(windows[at : at + rows], documents, eos_id, length)
        at += rows


Window = tuple[int, int, int, int]
"""Document, first input, end of inputs, first input whose next token is scored."""


def _windows(owner: int, tokens: int, context: int, stride: int) -> Iterator[Window]:
    first = 0
    while first < tokens:
        start = max(0, first - (context - stride))
        end = min(tokens, context if first == 0 else first + stride)
        yield owner, start, end, first
        first = end


def _block(windows: Sequence[Window], documents: Sequence[Document], eos_id: int, length: int) -> Block:
    shape = (len(windows), length)
    inputs_BT, labels_BT = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX)
    documents_BT, places_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, (owner, start, end, first) in enumerate(windows):
        tokens_N = documents[owner].tokens_N
        inputs_BT[row, : end - start] = np.concatenate([[eos_id], tokens_N[:end]])[start:end]
        labels_BT[row, first - start : end - start] = tokens_N[first:end]
        places_BT[row, : end - start] = np.arange(start, end)
        documents_BT[row] = owner
    return Block(*map(torch.from_numpy, (inputs_BT, labels_BT, documents_BT, places_BT)))
