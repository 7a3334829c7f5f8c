"""How well a model predicts a text: one forward pass, and of every scored token a few numbers.

Every scored token (`tutelage.evals.windows` says which are) is predicted exactly once, over the ids that the
text's tokenizer has: rows of a head that was padded beyond them get no probability, as in training. No more
than 2048 rows of logits exist at any time; what is kept per token does not depend on the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.bootstrap import ratio_interval
from tutelage.evals.windows import ScoredDocument, window_batches
from tutelage.models.hub import body_and_head, head_logits, logit_transform
from tutelage.types import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_LOGITS = 2**20
_FEWEST_ROWS, _MOST_ROWS = 256, 2048


@dataclass(frozen=True, slots=True)
class ScoreEstimate:
    """A number with its noise over documents.

    Attributes:
        value: point estimate.
        stderr: standard error; NaN for one document.
        low: lower end of the 95% interval; None for one document.
        high: its upper end.
    """

    value: float
    stderr: float
    low: float | None
    high: float | None


def ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> ScoreEstimate:
    """Total over total, with the ratio estimator's standard error and a bootstrap interval over documents."""
    n, total = len(numerator_N), float(denominator_N.sum())
    value = float(numerator_N.sum()) / total
    if n == 1:
        return ScoreEstimate(value, math.nan, None, None)
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
        """Exponential of the mean nats per token; its standard error by the delta method."""
        mean = ratio(self.nll_N, self.tokens_N)
        value = math.exp(mean.value)
        ends = [None if end is None else math.exp(end) for end in (mean.low, mean.high)]
        return ScoreEstimate(value, value * mean.stderr, *ends)


@dataclass(frozen=True, slots=True)
class WindowLosses:
    """Losses of W windows, in the order of documents and of the windows of a document.

    Attributes:
        document_W: place of the window's document in the list that was scored.
        window_W: which of the document's windows it is; 0 for the first.
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
        """Nats per token of first windows minus that of further ones, and of how many documents.

        Only documents with both count, so that texts do not differ; None if there is none. Windows of one
        length see equally much, so a model that knows how documents begin loses about the same in both.
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
        return ScoreEstimate(float(means[0] - means[1]), stderr, None, None), n


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What is kept of N scored tokens, in no particular order.

    Attributes:
        document_N: place of the token's document in the list that was scored.
        place_N: which token of its document it is.
        window_N: which window of its document it was scored in.
        label_N: the token, an id.
        logp_N: its log-probability in nats, float64.
        confidence_N: probability of the model's first choice.
        correct_N: whether the first choice is the token.
        brier_N: squared distance between the predicted distribution and the outcome, 0 to 2.
        sampled_N: whether the token is a row of `powered_MK`.
        powered_MK: for M of the tokens, log-probability after raising the distribution to the power of each
            of K inverse temperatures and normalising it.
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
        """Losses per document; `logp_N` are other log-probabilities of the same tokens."""
        values_N = self.logp_N if logp_N is None else logp_N
        return DocumentLosses(
            self.per_document(-values_N, len(documents)),
            np.array([document.scored for document in documents]),
            np.array([document.size for document in documents]),
        )

    def windows(self, documents: Sequence[ScoredDocument]) -> WindowLosses:
        """Losses per window."""
        bytes_N = np.zeros(len(self.document_N))
        for number, document in enumerate(documents):
            own_N = self.document_N == number
            bytes_N[own_N] = document.bytes_N[self.place_N[own_N]]
        keys_W, window_N = np.unique(
            np.stack([self.document_N, self.window_N], 1), axis=0, return_inverse=True
        )
        sums = (np.bincount(window_N, weights, len(keys_W)) for weights in (-self.logp_N, None, bytes_N))
        nll_W, tokens_W, bytes_W = sums
        return WindowLosses(keys_W[:, 0], keys_W[:, 1], nll_W, tokens_W, bytes_W.astype(np.int64))

    def per_document(self, values_N: np.ndarray, documents: int) -> np.ndarray:
        """Sums of a value over each document's tokens, float64."""
        return np.bincount(self.document_N, weights=values_N, minlength=documents)


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
        context: window length in tokens; at most the trained length, so that nothing extrapolates.
        stride: tokens scored per further window; default: `context`, windows that do not overlap.
        powers: inverse temperatures at which to take log-probabilities as well.
        every: take them of every `every`-th token of a document only.
        progress: called with the number of tokens scored since the last call.
    """
    model.eval()
    body, head = body_and_head(model)
    device = head.weight.device
    parts = []
    with torch.inference_mode():
        for batch in window_batches(documents, context, stride or context):
            hidden_BTD = body(input_ids=batch.inputs_BT.to(device), use_cache=False).last_hidden_state
            scored_BT = batch.labels_BT != IGNORE_INDEX
            labels_N, places_N = batch.labels_BT[scored_BT], batch.places_BT[scored_BT]
            sampled_N = (places_N % every == 0) & bool(powers)
            measured = _measured_in_pieces(
                hidden_BTD[scored_BT.to(device)],
                partial(head_logits, head, transform=logit_transform(model), vocab_size=vocab_size),
                min(max(_LOGITS // vocab_size, _FEWEST_ROWS), _MOST_ROWS),
                (labels_N.to(device), sampled_N.to(device)),
                powers,
            )
            where = batch.documents_BT[scored_BT], places_N, batch.windows_BT[scored_BT]
            parts.append([*where, labels_N, *measured[:-1], sampled_N, measured[-1]])
            progress(len(labels_N))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    document_N, place_N, window_N, label_N, logp_N, *rest = columns
    return TokenScores(document_N, place_N, window_N, label_N, logp_N.astype(np.float64), *rest)


def _measured_in_pieces(
    hidden_ND: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    rows: int,
    labels_and_sampled: tuple[Tensor, Tensor],
    powers: Sequence[float],
) -> list[Tensor]:
    """`_measured`, with only `rows` rows of logits at a time: few enough for a CPU's cache to help."""
    pieces = [
        _measured(logits_of(hidden), labels, sampled, powers)
        for hidden, labels, sampled in zip(
            *(torch.split(x, rows) for x in (hidden_ND, *labels_and_sampled)), strict=True
        )
    ]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def _measured(
    logits_NV: Tensor, labels_N: Tensor, sampled_N: Tensor, powers: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row: log-probability, confidence, correctness, Brier score; of sampled rows also those at `powers`.

    With e = exp(logit - largest): p = e / sum e, so the confidence is 1 / sum e and the sum of p^2 is
    sum e^2 / (sum e)^2; the Brier score is sum p^2 - 2 p(label) + 1. The logits are overwritten.
    """
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=1, keepdim=True))
    gold_N = shifted_NV.gather(1, labels_N[:, None])[:, 0]
    powered_MK = _powered(shifted_NV, gold_N, sampled_N, powers)
    correct_N = gold_N == 0
    correct_N[correct_N.clone()] = shifted_NV[correct_N].argmax(1) == labels_N[correct_N]  # one of equal ones
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
