"""Calibration of next-token predictions: does a model that says 70% get it right 70% of the time?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from tutelage.evals.perplexity import Measured
from tutelage.resampling import content_order, resampled_sums

if TYPE_CHECKING:
    from tutelage.evals.perplexity import TokenScores

BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """One point of a reliability curve.

    Attributes:
        low: confidences in the bin are at least this.
        high: and below this (the last bin includes it).
        tokens: how many there are.
        confidence: mean probability of the first choice; null in JSON if the bin is empty.
        accuracy: share of first choices that are the token; null if the bin is empty.
    """

    low: float
    high: float
    tokens: int
    confidence: float | None
    accuracy: float | None


def fixed_edges() -> np.ndarray:
    """Ends of bins of equal width."""
    return np.linspace(0.0, 1.0, BINS + 1)


def adaptive_edges(confidence_N: np.ndarray) -> np.ndarray:
    """Ends of bins that hold equally many tokens (fewer bins where many confidences are the same)."""
    inner = np.unique(np.quantile(confidence_N, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.concatenate([[0.0], inner[(inner > 0) & (inner < 1)], [1.0]])


def reliability(scores: TokenScores, edges: np.ndarray) -> list[dict[str, float | None]]:
    """The reliability curve, as plain data for JSON."""
    place_N = _bins(scores.confidence_N, edges)
    tokens_B, confident_B, correct_B = (
        np.bincount(place_N, weights=weights, minlength=len(edges) - 1)
        for weights in (None, scores.confidence_N, scores.correct_N)
    )
    return [
        asdict(Bin(float(low), float(high), int(n), *((float(p / n), float(a / n)) if n else (None, None))))
        for low, high, n, p, a in zip(edges, edges[1:], tokens_B, confident_B, correct_B, strict=False)
    ]


def calibration_error(scores: TokenScores, edges: np.ndarray, documents: int) -> Measured:
    """Expected calibration error: mean over tokens of |accuracy - confidence| of the token's bin.

    Its bootstrap over documents keeps the bins. Noise only adds to an absolute value, so resampled errors
    are too large by about as much as the estimate itself is; the interval is therefore reflected about the
    estimate ("basic" bootstrap).

    Args:
        scores: tokens with confidence and correctness.
        edges: ends of the bins.
        documents: how many documents the tokens belong to.
    """
    bins = len(edges) - 1
    cell_N = scores.document_N * bins + _bins(scores.confidence_N, edges)
    gap_N = scores.correct_N - scores.confidence_N.astype(np.float64)
    gaps_DB = np.bincount(cell_N, weights=gap_N, minlength=documents * bins).reshape(documents, bins)
    tokens_D1 = np.bincount(scores.document_N, minlength=documents)[:, None].astype(np.float64)
    value = float(np.abs(gaps_DB.sum(0)).sum() / tokens_D1.sum())
    if documents == 1:
        return Measured(value, np.nan, None, None)
    sums = resampled_sums(*content_order(np.concatenate([gaps_DB, tokens_D1], axis=1)))
    drawn = np.abs(sums[:, :-1]).sum(1) / sums[:, -1]
    low, high = 2 * value - np.quantile(drawn, [0.975, 0.025])
    return Measured(value, float(drawn.std(ddof=1)), max(0.0, float(low)), max(value, float(high)))


def _bins(confidence_N: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of every confidence; one that is an end belongs to the bin above it, except the last."""
    return np.minimum(np.searchsorted(edges, confidence_N, side="right") - 1, len(edges) - 2)
