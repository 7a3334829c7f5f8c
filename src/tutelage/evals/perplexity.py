"""How well a model predicts a text: bits per byte and perplexity, with the losses of every document.

Documents are scored from their beginning in windows of the trained context that do not overlap; every
token but the end-of-text mark is predicted exactly once, the first one from the end-of-text mark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from tutelage.errors import UserError
from tutelage.models.hub import body_and_head, logit_transform
from tutelage.types import IGNORE_INDEX, LogitTransform, Split, transformed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from tutelage.data.store import SplitView, Store

_FORWARD_TOKENS = 4096
_LOGIT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class DocumentLosses:
    """Losses of the scored documents of one split, in store order.

    Attributes:
        nll_N: sum of -log p over the document's scored tokens, in nats, float64.
        tokens_N: scored tokens.
        bytes_N: UTF-8 bytes of the scored text.
    """

    nll_N: np.ndarray
    tokens_N: np.ndarray
    bytes_N: np.ndarray

    def bits_per_byte(self) -> tuple[float, float]:
        """Total bits over total bytes, and its standard error over documents (ratio estimator)."""
        return _ratio(self.nll_N / math.log(2), self.bytes_N)

    def perplexity(self) -> tuple[float, float]:
        """Exponential of the mean nats per token, and its standard error over documents (delta method)."""
        mean, stderr = _ratio(self.nll_N, self.tokens_N)
        return math.exp(mean), math.exp(mean) * stderr


def _ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> tuple[float, float]:
    n, total = len(numerator_N), float(denominator_N.sum())
    ratio = float(numerator_N.sum()) / total
    if n == 1:
        return ratio, math.nan
    residual_N = numerator_N - ratio * denominator_N
    return ratio, math.sqrt(n / (n - 1) * float((residual_N**2).sum())) / total


def score_documents(
    model: PreTrainedModel, store: Store, split: Split, context: int, max_documents: int, max_tokens: int
) -> DocumentLosses:
    """Score the first `max_documents` documents of a split, each up to `max_tokens` tokens.

    Args:
        model: a causal language model; put into eval mode.
        store: token store made with the model's tokenizer.
        split: "validation" or "test".
        context: window length in tokens; at most the trained length, so that nothing extrapolates.
        max_documents: documents to score.
        max_tokens: tokens to score in each, from its beginning.

    Raises:
        UserError: the split is empty.
    """
    view = store.split(split)
    documents = _documents(view, max_documents, max_tokens)
    if not documents:
        raise UserError(f"{store.path}: split '{split}' has no document to score")
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    texts = tokenizer.decode_batch([tokens.tolist() for tokens in documents], skip_special_tokens=False)
    model.eval()
    body, head = body_and_head(model)
    nll = np.zeros(len(documents))
    device = head.weight.device
    with torch.inference_mode():
        for owners, inputs_BT, labels_BT in _windows(documents, store.eos_id, context):
            hidden = body(input_ids=inputs_BT.to(device), use_cache=False).last_hidden_state
            nll_B = _nll(hidden, head.weight, labels_BT.to(device), logit_transform(model))
            np.add.at(nll, owners, nll_B.double().cpu().numpy())
    return DocumentLosses(
        nll,
        np.array([len(tokens) for tokens in documents]),
        np.array([len(text.encode()) for text in texts]),
    )


def _documents(view: SplitView, max_documents: int, max_tokens: int) -> list[np.ndarray]:
    """Token ids of the documents to score, without their end-of-text mark."""
    starts = view.offsets[:, 0].astype(np.int64)
    spans = zip(starts[:-1], starts[1:] - 1, strict=True)
    kept = [(a, min(b, a + max_tokens)) for a, b in spans if b > a]
    return [np.asarray(view.tokens[a:b], dtype=np.int64) for a, b in kept[:max_documents]]


def _windows(
    documents: list[np.ndarray], eos_id: int, context: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Batches of (owning document, inputs, labels); short windows are padded and the padding ignored."""
    owners: list[int] = []
    rows: list[np.ndarray] = []
    for index, tokens in enumerate(documents):
        sequence = np.concatenate([[eos_id], tokens])
        for start in range(0, len(tokens), context):
            row = np.full(context + 1, IGNORE_INDEX)
            piece = sequence[start : start + context + 1]
            row[: len(piece)] = piece
            owners.append(index)
            rows.append(row)
    size = max(1, _FORWARD_TOKENS // context)
    for start in range(0, len(rows), size):
        block = torch.from_numpy(np.stack(rows[start : start + size]))
        yield np.array(owners[start : start + size]), block[:, :-1].clamp(min=0), block[:, 1:]


def _nll(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, transform: LogitTransform) -> Tensor:
    """Sum of -log p(label) per window, with only `_LOGIT_TOKENS` rows of logits at a time."""
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    nll = []
    for start in range(0, len(labels_N), _LOGIT_TOKENS):
        rows = slice(start, start + _LOGIT_TOKENS)
        logits = transformed((hidden_ND[rows] @ weight_VD.T).float(), transform)
        nll.append(F.cross_entropy(logits, labels_N[rows], reduction="none", ignore_index=IGNORE_INDEX))
    return torch.cat(nll).view(labels_BT.shape).double().sum(1)
