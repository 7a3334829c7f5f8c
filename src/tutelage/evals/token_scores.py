"""Predict every scored token of a text once, and keep a few numbers of each.

The distribution is over the ids of the text's tokenizer: rows of a head that was padded beyond them get no
probability, as in training. No more than 2048 rows of logits exist at any time; the memory kept per token
does not depend on the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.bootstrap import ratio_interval
from tutelage.evals.windows import window_batches
from tutelage.models.hub import body_and_head, head_logits, logit_transform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tutelage.evals.windows import ScoredDocument
    from tutelage.types import LogitTransform

_LOGITS = 2**20
_FEWEST_ROWS, _MOST_ROWS = 256, 2048
_MOST_NATS = 700.0
"""Of which float64 holds the exponential, 1e304, and a multiple of it."""


@dataclass(frozen=True, slots=True)
class ScoreEstimate:
    """A number and its noise over documents.

    Attributes:
        value: point estimate.
        stderr: standard error; NaN for one document.
        low: lower end of the 95% interval; None for one document.
        high: its upper end.
    """

    value: float
    stderr: float
    low: float | None = None
    high: float | None = None


def ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> ScoreEstimate:
    """Ratio of totals, with its standard error and a bootstrap interval over documents."""
    n, total = len(numerator_N), float(denominator_N.sum())
    value = float(numerator_N.sum()) / total
    if n == 1:
        return ScoreEstimate(value, math.nan)
    residual_N = numerator_N - value * denominator_N
    stderr = math.sqrt(n / (n - 1) * float((residual_N**2).sum())) / total
    return ScoreEstimate(value, stderr, *ratio_interval(numerator_N, denominator_N))


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

    def bits_per_byte(self) -> ScoreEstimate:
        """Total bits over total bytes."""
        return ratio(self.nll_N / math.log(2), self.bytes_N)

    def perplexity(self) -> ScoreEstimate:
        """Exponential of the mean nats per token, at most 700; its standard error by the delta method."""
        mean = ratio(self.nll_N, self.tokens_N)
        value = math.exp(min(mean.value, _MOST_NATS))
        ends = [None if end is None else math.exp(min(end, _MOST_NATS)) for end in (mean.low, mean.high)]
        return ScoreEstimate(value, value * mean.stderr, *ends)


@dataclass(frozen=True, slots=True)
class WindowLosses:
    """Losses of W windows, in the order of documents and of the windows of a document.

    Attributes:
        document_W: index of the window's document in the scored list.
        window_W: index of the window in its document; 0 for the first.
        nll_W: sum of -log p over its scored tokens, in nats, float64.
        tokens_W: scored tokens.
        bytes_W: UTF-8 bytes of the scored text.
    """

    document_W: np.ndarray
    window_W: np.ndarray
    nll_W: np.ndarray
    tokens_W: np.ndarray
    bytes_W: np.ndarray

    def first_excess(self, documents: int) -> tuple[ScoreEstimate | None, int]:
        """Nats per token of first windows minus those of further windows, and the number of documents.

        Only documents with both count, so that the texts are the same; None if there is none. Windows of one
        length have equal context, so a model that knows how documents begin loses about the same in both.
        """
        further = self.window_W > 0
        nll, tokens = (
            np.array([np.bincount(self.document_W[r], column[r], documents) for r in (~further, further)])
            for column in (self.nll_W, self.tokens_W)
        )
        both_N = (tokens > 0).all(0)
        n = int(both_N.sum())
        if n == 0:
            return None, 0
        nll, tokens = nll[:, both_N], tokens[:, both_N]
        means = nll.sum(1) / tokens.sum(1)
        residual_N = np.subtract(*((nll - means[:, None] * tokens) / tokens.sum(1, keepdims=True)))
        stderr = math.sqrt(n / (n - 1) * float((residual_N**2).sum())) if n > 1 else math.nan
        return ScoreEstimate(float(means[0] - means[1]), stderr), n


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Numbers of N scored tokens, in no particular order.

    Attributes:
        document_N: index of the token's document in the scored list.
        place_N: index of the token in its document.
        window_N: index, in its document, of the window that it was scored in.
        label_N: id of the token.
        logp_N: its log-probability in nats, float64.
        confidence_N: probability of the model's first choice.
        correct_N: whether the first choice is the token.
        brier_N: squared distance between the predicted distribution and the outcome, 0 to 2.
        sampled_N: whether the token has a row in `powered_MK`.
        powered_MK: log-probability of M of the tokens at each of K inverse temperatures.
    """

    document_N: np.ndarray
    place_N: np.ndarray
    window_N: np.ndarray
    label_N: np.ndarray
    logp_N: np.ndarray
    confidence_N: np.ndarray
    correct_N: np.ndarray
    brier_N: np.ndarray
    sampled_N: np.ndarray
    powered_MK: np.ndarray

    def losses(self, documents: Sequence[ScoredDocument], logp_N: np.ndarray | None = None) -> DocumentLosses:
        """Losses per document, by `logp_N` or other log-probabilities of the same tokens."""
        values_N = self.logp_N if logp_N is None else logp_N
        return DocumentLosses(
            self.per_document(-values_N, len(documents)),
            np.array([document.scored for document in documents]),
            np.array([document.size for document in documents]),
        )

    def windows(self, documents: Sequence[ScoredDocument]) -> WindowLosses:
        """Losses per window."""
        starts_D = np.cumsum([0, *(len(document.bytes_N) for document in documents[:-1])])
        bytes_N = np.concatenate([document.bytes_N for document in documents])[
            starts_D[self.document_N] + self.place_N
        ]
        keys_W, window_N = np.unique(
            np.stack([self.document_N, self.window_N], 1), axis=0, return_inverse=True
        )
        sums = (np.bincount(window_N, weights, len(keys_W)) for weights in (-self.logp_N, None, bytes_N))
        nll_W, tokens_W, bytes_W = sums
        return WindowLosses(keys_W[:, 0], keys_W[:, 1], nll_W, tokens_W, bytes_W.astype(np.int64))

    def per_document(self, values_N: np.ndarray, documents: int) -> np.ndarray:
        """Sums of a value over each document's tokens, float64."""
        return np.bincount(self.document_N, weights=values_N, minlength=documents)


@dataclass(frozen=True, slots=True)
class NextTokenModel:
    """A causal language model, split at its hidden states; its head predicts the tokenizer's ids alone.

    Attributes:
        body: gives hidden states.
        head: the output embedding.
        transform: applied to the logits.
        vocab_size: number of ids of the tokenizer; rows of the head beyond them are padding.
    """

    body: nn.Module
    head: nn.Linear
    transform: LogitTransform
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> NextTokenModel:
        """Split a model, and put it into eval mode."""
        return cls(*body_and_head(model.eval()), logit_transform(model), vocab_size)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def hidden(self, inputs_BT: Tensor, keep_BT: Tensor) -> Tensor:
        """Hidden states [N, D] of the N positions to keep."""
        inputs_BT, keep_BT = inputs_BT.to(self.device), keep_BT.to(self.device)
        hidden_BTD: Tensor = self.body(input_ids=inputs_BT, use_cache=False).last_hidden_state
        return hidden_BTD[keep_BT]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V], float32, over the tokenizer's ids."""
        return head_logits(self.head, hidden_ND, self.transform, self.vocab_size)


def rows_at_a_time(vocab_size: int) -> int:
    """Rows of logits that are formed at a time: few enough for a CPU's cache to help."""
    return min(max(_LOGITS // vocab_size, _FEWEST_ROWS), _MOST_ROWS)


@torch.no_grad()  # in inference mode FSDP, if this is its first pass, would keep tensors unfit for training
def score_tokens(
    model: PreTrainedModel,
    documents: Sequence[ScoredDocument],
    vocab_size: int,
    context: int,
    stride: int | None = None,
    powers: Sequence[float] = (),
    every: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> TokenScores:
    """Predict every scored token of `documents` once.

    Args:
        model: a causal language model; put into eval mode.
        documents: token ids made with the model's tokenizer.
        vocab_size: number of ids of that tokenizer; rows of the head beyond them get no probability.
        context: window length in tokens; at most the trained length, so that the model does not extrapolate.
        stride: tokens scored per further window; default: `context`, windows that do not overlap.
        powers: inverse temperatures at which to take log-probabilities as well.
        every: take them of every `every`-th token of a document only.
        progress: called with the number of tokens scored since the last call.
    """
    predictor = NextTokenModel.of(model, vocab_size)
    rows = rows_at_a_time(vocab_size)
    parts = []
    for batch in window_batches(documents, context, stride or context):
        scored_BT = batch.scored_BT
        labels_N, places_N = batch.labels_BT[scored_BT], batch.places_BT[scored_BT]
        sampled_N = (places_N % every == 0) & bool(powers)
        columns = (
            predictor.hidden(batch.inputs_BT, scored_BT),
            labels_N.to(predictor.device),
            sampled_N.to(predictor.device),
        )
        pieces = [
            _measured(predictor.logits(hidden_ND), labels, sampled, powers)
            for hidden_ND, labels, sampled in zip(*(torch.split(x, rows) for x in columns), strict=True)
        ]
        *measured, powered_MK = (torch.cat(column) for column in zip(*pieces, strict=True))
        where = batch.documents_BT[scored_BT], places_N, batch.windows_BT[scored_BT]
        parts.append([*where, labels_N, *measured, sampled_N, powered_MK])
        progress(len(labels_N))
    arrays = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    document_N, place_N, window_N, label_N, logp_N, *rest = arrays
    return TokenScores(document_N, place_N, window_N, label_N, logp_N.astype(np.float64), *rest)


def _measured(
    logits_NV: Tensor, labels_N: Tensor, sampled_N: Tensor, powers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, confidence, correctness and Brier score per row; `powers` for the sampled rows.

    With e = exp(logit - largest): p = e / sum e, so the confidence is 1 / sum e and the sum of p^2 is
    sum e^2 / (sum e)^2; the Brier score is sum p^2 - 2 p(label) + 1. The logits are overwritten.
    """
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=1, keepdim=True))
    gold_N = shifted_NV.gather(1, labels_N[:, None])[:, 0]
    powered_MK = _powered(shifted_NV, gold_N, sampled_N, powers)
    correct_N = gold_N == 0
    correct_N[correct_N.clone()] = (
        shifted_NV[correct_N].argmax(1) == labels_N[correct_N]
    )  # the first of equal ones
    e_NV = shifted_NV.exp_()
    total_N = e_NV.sum(1)
    logp_N = gold_N - total_N.log()
    brier_N = (torch.linalg.vector_norm(e_NV, dim=1) / total_N) ** 2 - 2 * logp_N.exp() + 1
    return logp_N, 1 / total_N, correct_N, brier_N, powered_MK


def _powered(shifted_NV: Tensor, gold_N: Tensor, sampled_N: Tensor, powers: Sequence[float]) -> Tensor:
    """Log-probability of the label at each inverse temperature, for the sampled rows."""
    chosen_NV = shifted_NV if powers and bool(sampled_N.all()) else shifted_NV[sampled_N]
    powered_MK = gold_N.new_empty(len(chosen_NV), len(powers))
    for k, power in enumerate(powers):
        powered_MK[:, k] = power * gold_N[sampled_N] - (power * chosen_NV).exp_().sum(1).log()
    return powered_MK
