"""How well a model predicts a text: one forward pass, and of every scored token a few numbers.

Every token but the end-of-text mark is predicted exactly once, the first one from the end-of-text mark.
No more than 2048 rows of logits exist at any time; what is kept per token does not depend on the
vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.evals.windows import Document, blocks
from tutelage.models.hub import body_and_head, logit_transform
from tutelage.resampling import ratio_interval
from tutelage.types import IGNORE_INDEX, LogitTransform, transformed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_LOGITS = 2**20
_FEWEST_ROWS, _MOST_ROWS = 256, 2048


@dataclass(frozen=True, slots=True)
class Measured:
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


def ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> Measured:
    """Total over total, with the ratio estimator's standard error and a bootstrap interval over documents."""
    n, total = len(numerator_N), float(denominator_N.sum())
    value = float(numerator_N.sum()) / total
    if n == 1:
        return Measured(value, math.nan, None, None)
    residual_N = numerator_N - value * denominator_N
    stderr = math.sqrt(n / (n - 1) * float((residual_N**2).sum())) / total
    return Measured(value, stderr, *ratio_interval(numerator_N, denominator_N))


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

    def bits_per_byte(self) -> Measured:
        """Total bits over total bytes."""
        return ratio(self.nll_N / math.log(2), self.bytes_N)

    def perplexity(self) -> Measured:
        """Exponential of the mean nats per token; its standard error by the delta method."""
        mean = ratio(self.nll_N, self.tokens_N)
        value = math.exp(mean.value)
        ends = [None if end is None else math.exp(end) for end in (mean.low, mean.high)]
        return Measured(value, value * mean.stderr, *ends)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What is kept of N scored tokens, in no particular order.

    Attributes:
        document_N: place of the token's document in the list that was scored.
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
    label_N: np.ndarray
    logp_N: np.ndarray
    confidence_N: np.ndarray
    correct_N: np.ndarray
    brier_N: np.ndarray
    sampled_N: np.ndarray
    powered_MK: np.ndarray

    def losses(self, documents: Sequence[Document], logp_N: np.ndarray | None = None) -> DocumentLosses:
        """Losses per document; `logp_N` are other log-probabilities of the same tokens."""
        values_N = self.logp_N if logp_N is None else logp_N
        return DocumentLosses(
            self.per_document(-values_N, len(documents)),
            np.array([len(document.tokens_N) for document in documents]),
            np.array([document.size for document in documents]),
        )

    def per_document(self, values_N: np.ndarray, documents: int) -> np.ndarray:
        """Sums of a value over each document's tokens, float64."""
        return np.bincount(self.document_N, weights=values_N, minlength=documents)


def score_tokens(
    model: PreTrainedModel,
    documents: Sequence[Document],
    eos_id: int,
    context: int,
    stride: int | None = None,
    powers: Sequence[float] = (),
    every: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> TokenScores:
    """Predict every token of `documents` once.

    Args:
        model: a causal language model; put into eval mode.
        documents: token ids made with the model's tokenizer.
        eos_id: id of the end-of-text mark.
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
        for block in blocks(documents, eos_id, context, stride or context):
            hidden_BTD = body(input_ids=block.inputs_BT.to(device), use_cache=False).last_hidden_state
            scored_BT = block.labels_BT != IGNORE_INDEX
            labels_N = block.labels_BT[scored_BT]
            sampled_N = (block.places_BT[scored_BT] % every == 0) & bool(powers)
            measured = _measured_in_pieces(
                hidden_BTD[scored_BT.to(device)],
                head.weight,
                logit_transform(model),
                (labels_N.to(device), sampled_N.to(device)),
                powers,
            )
            parts.append([block.documents_BT[scored_BT], labels_N, *measured, sampled_N])
            progress(len(labels_N))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    document_N, label_N, logp_N, confidence_N, correct_N, brier_N, powered_MK, sampled = columns
    logp_N = logp_N.astype(np.float64)
    return TokenScores(document_N, label_N, logp_N, confidence_N, correct_N, brier_N, sampled, powered_MK)


def _measured_in_pieces(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    transform: LogitTransform,
    labels_and_sampled: tuple[Tensor, Tensor],
    powers: Sequence[float],
) -> list[Tensor]:
    """`_measured`, with only some rows of logits at a time: few enough for a CPU's cache to help."""
    rows = min(max(_LOGITS // len(weight_VD), _FEWEST_ROWS), _MOST_ROWS)
    pieces = [
        _measured(transformed((hidden @ weight_VD.T).float(), transform), labels, sampled, powers)
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
