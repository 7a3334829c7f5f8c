"""Measure calibration, and fit a temperature and a share of unigram that tell smoothing from knowledge.

A model that merely hedges better than another scores better on foreign text without knowing more of it. Two
repairs, fitted on a domain's validation split and applied to its test split, give every model that advantage:
one temperature, or one temperature and one weight w of (1 - w) p + w unigram. A gain over another model that
vanishes was calibration; what remains is knowledge. The unigram is that of the validation split, so every
model gets the same one.

The fit needs no second pass: one forward pass gives log-probabilities at `POWERS`, and a cubic spline
interpolates every token's log-probability between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq, minimize_scalar

from tutelage.bootstrap import content_order, resampled_sums
from tutelage.evals.token_scores import ScoreEstimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.evals.token_scores import TokenScores

BINS = 15


def fixed_edges() -> np.ndarray:
    """Edges of bins of equal width."""
    return np.linspace(0.0, 1.0, BINS + 1)


def adaptive_edges(confidence_N: np.ndarray) -> np.ndarray:
    """Edges of bins with equally many tokens (fewer bins if many confidences are equal)."""
    inner = np.unique(np.quantile(confidence_N, np.linspace(0, 1, BINS + 1)[1:-1]))
    return np.concatenate([[0.0], inner[(inner > 0) & (inner < 1)], [1.0]])


def reliability(scores: TokenScores, edges: np.ndarray) -> list[dict[str, float | None]]:
    """The reliability curve, for JSON.

    Returns:
        For each bin, `low` and `high` (confidences from low to below high; the last bin includes high),
        `tokens`, mean `confidence` in the first choice and its `accuracy`; both None in an empty bin.
    """
    place_N = _bins(scores.confidence_N, edges)
    tokens_B, confident_B, correct_B = (
        np.bincount(place_N, weights=weights, minlength=len(edges) - 1)
        for weights in (None, scores.confidence_N, scores.correct_N)
    )
    return [
        {
            "low": float(low),
            "high": float(high),
            "tokens": int(n),
            "confidence": float(p / n) if n else None,
            "accuracy": float(a / n) if n else None,
        }
        for low, high, n, p, a in zip(edges, edges[1:], tokens_B, confident_B, correct_B, strict=False)
    ]


def calibration_error(scores: TokenScores, edges: np.ndarray, documents: int) -> ScoreEstimate:
    """Expected calibration error: mean over tokens of |accuracy - confidence| of the token's bin.

    The bootstrap over documents keeps the bins. Noise only adds to an absolute value, so resampled errors
    are too large by about as much as the estimate is; the interval is therefore reflected about the estimate
    (the "basic" bootstrap).
    """
    bins = len(edges) - 1
    cell_N = scores.document_N * bins + _bins(scores.confidence_N, edges)
    gap_N = scores.correct_N - scores.confidence_N.astype(np.float64)
    gaps_DB = np.bincount(cell_N, weights=gap_N, minlength=documents * bins).reshape(documents, bins)
    tokens_D1 = np.bincount(scores.document_N, minlength=documents)[:, None].astype(np.float64)
    value = float(np.abs(gaps_DB.sum(0)).sum() / tokens_D1.sum())
    if documents == 1:
        return ScoreEstimate(value, np.nan)
    sums = resampled_sums(*content_order(np.concatenate([gaps_DB, tokens_D1], axis=1)))
    drawn = np.abs(sums[:, :-1]).sum(1) / sums[:, -1]
    low, high = 2 * value - np.quantile(drawn, [0.975, 0.025])
    return ScoreEstimate(value, float(drawn.std(ddof=1)), max(0.0, float(low)), max(value, float(high)))


def _bins(confidence_N: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of every confidence; one on an edge belongs to the bin above it, except on the last."""
    return np.minimum(np.searchsorted(edges, confidence_N, side="right") - 1, len(edges) - 2)


POWERS = tuple(float(power) for power in np.geomspace(0.2, 3.0, 13))
"""Inverse temperatures of which a forward pass gives log-probabilities: temperatures from 5 to 1/3."""

FIT_TOKENS = 32_768
"""About this many tokens of a domain enter the fit, evenly spread over each document."""

_LEAST = 1e-300


@dataclass(frozen=True, slots=True)
class FitNoise:
    """Noise in a score from the choice of the documents that its fit was made on.

    Attributes:
        linear: part that falls with the amount of scored text, in nats per token times the square root of
            documents.
        curved: part that does not depend on it, in nats per token.

    Both are NaN for a fit on one document.
    """

    linear: float
    curved: float

    def nats(self, documents: int) -> float:
        """Root mean square error of a mean over the tokens of `documents` documents, in nats per token."""
        return math.hypot(self.linear / math.sqrt(documents), self.curved)


@dataclass(frozen=True, slots=True)
class CalibrationFit:
    """Parameters fitted on a domain's validation split.

    Attributes:
        temperature: of the logits, without a unigram.
        mixed_temperature: of the logits in the mixture with the unigram.
        weight: of the unigram in that mixture, 0 to 1.
        tokens: number of tokens in the fit.
        documents: number of their documents.
        alone_noise: of scores with the temperature alone.
        mixed_noise: of scores with the mixture, where the unigram counts as given.
        variance: of the logarithm of `temperature` over documents; NaN for one document.
    """

    temperature: float
    mixed_temperature: float
    weight: float
    tokens: int
    documents: int
    alone_noise: FitNoise
    mixed_noise: FitNoise
    variance: float


def mixed(logp_N: np.ndarray, unigram_N: np.ndarray, weight: float) -> np.ndarray:
    """Log-probabilities of (1 - weight) p + weight unigram."""
    mixture_N = (1 - weight) * np.exp(np.asarray(logp_N, np.float64)) + weight * unigram_N
    return np.log(np.maximum(mixture_N, _LEAST))


def fit(powered_NK: np.ndarray, unigram_N: np.ndarray, document_N: np.ndarray) -> CalibrationFit:
    """Find the temperature, and the mixture, under which N tokens are most probable.

    The loss is convex in the inverse temperature alone. In the mixture it is convex in the weight at each
    temperature, so the weight is solved for inside; a bounded search starts at the grid's best temperature.

    Args:
        powered_NK: log-probabilities of the tokens at `POWERS`.
        unigram_N: probabilities of the tokens under the unigram, all positive.
        document_N: document of each token; documents are the independent units of the noise.
    """
    spline = _spline(powered_NK)
    alone = _best_power(lambda log_power: float(-spline(log_power).mean()))
    mixed = _best_power(lambda log_power: _mixed(spline(log_power), unigram_N)[0])
    weight = _mixed(spline(np.log(mixed)), unigram_N)[1]
    # At an end of its range a parameter is held there and not by the text, so it has no noise.
    ends = POWERS[0], POWERS[-1]
    free = [alone not in ends]
    alone_noise, variance = _noise(*_alone_derivatives(spline, alone), document_N, free)
    free = [mixed not in ends, 0 < weight < 1]
    mixed_noise, _ = _noise(*_mixed_derivatives(spline, mixed, weight, unigram_N), document_N, free)
    return CalibrationFit(
        temperature=1 / alone,
        mixed_temperature=1 / mixed,
        weight=weight,
        tokens=len(unigram_N),
        documents=len(np.unique(document_N)),
        alone_noise=alone_noise,
        mixed_noise=mixed_noise,
        variance=variance,
    )


def foreign_noise(powered_NK: np.ndarray, other: CalibrationFit) -> float:
    """Error in a score of this text from the noise of the temperature of `other`, in nats per token.

    On a text that it was not fitted on, a temperature is not at the optimum, so the score depends on it in
    the first order.

    Args:
        powered_NK: log-probabilities of tokens of this text at `POWERS`.
        other: the fit whose temperature is applied.
    """
    slopes_N1, curvature = _alone_derivatives(_spline(powered_NK), 1 / other.temperature)
    slope = float(slopes_N1.mean())
    return math.sqrt(other.variance * slope**2 + 0.75 * (float(curvature[0, 0]) * other.variance) ** 2)


def _spline(powered_NK: np.ndarray) -> CubicSpline:
    """Log-probability of each token as a function of the logarithm of the power."""
    return CubicSpline(np.log(POWERS), np.asarray(powered_NK, np.float64), axis=1)


def _alone_derivatives(spline: CubicSpline, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope of each token's loss in the logarithm of the power [N, 1], and its mean second derivative."""
    at = np.log(power)
    return -spline(at, 1)[:, None], -spline(at, 2).mean(keepdims=True)[None]


def _mixed_derivatives(
    spline: CubicSpline, power: float, weight: float, unigram_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `_alone_derivatives`, in the logarithm of the power and in the weight: [N, 2] and [2, 2]."""
    at = np.log(power)
    p_N, slope_N, bend_N = np.maximum(np.exp(spline(at)), _LEAST), spline(at, 1), spline(at, 2)
    mixture_N = (1 - weight) * p_N + weight * unigram_N
    share_N = (1 - weight) * p_N / mixture_N
    by_weight_N = (p_N - unigram_N) / mixture_N
    twice_N = (share_N * slope_N) ** 2 - share_N * (slope_N**2 + bend_N)
    across = float((slope_N * p_N * unigram_N / mixture_N**2).mean())
    curvature = np.array([[twice_N.mean(), across], [across, (by_weight_N**2).mean()]])
    return np.stack([-share_N * slope_N, by_weight_N], 1), curvature


def _noise(
    slopes_NP: np.ndarray, curvature_PP: np.ndarray, document_N: np.ndarray, free: Sequence[bool]
) -> tuple[FitNoise, float]:
    """Noise of scores whose P parameters were fitted on N tokens, and the variance of the first free one.

    The covariance of the parameters over documents is C = H^-1 S H^-1 (the sandwich estimator), where S is
    the variance of the summed slopes over documents and H the summed curvature. On other documents of the
    same kind, a deviation d changes the mean loss by slope @ d + d @ H @ d / 2; the slope there is
    independent of d, has mean 0 and, per document, the same variance. Parameters that the text does not
    determine, where the loss is not convex, count as fixed.
    """
    n = len(slopes_NP)
    _, place_N = np.unique(document_N, return_inverse=True)
    documents = int(place_N.max()) + 1
    if documents == 1:
        return FitNoise(math.nan, math.nan), math.nan
    places = np.flatnonzero(free)
    slopes_NP, curvature_PP = slopes_NP[:, places], curvature_PP[np.ix_(places, places)]
    if not len(places) or np.linalg.eigvalsh(curvature_PP).min() <= 0:
        return FitNoise(0.0, 0.0), 0.0
    sums_DP = np.stack([np.bincount(place_N, weights=slopes_N) for slopes_N in slopes_NP.T], 1)
    centred_DP = sums_DP - sums_DP.mean(0)
    spread_PP = documents / (documents - 1) * centred_DP.T @ centred_DP
    inverse_PP = np.linalg.inv(n * curvature_PP)
    covariance_PP = inverse_PP @ spread_PP @ inverse_PP
    excess_PP = curvature_PP @ covariance_PP
    curved = math.sqrt(np.trace(excess_PP @ excess_PP) / 2 + np.trace(excess_PP) ** 2 / 4)
    linear = math.sqrt(np.trace(spread_PP @ covariance_PP) * documents) / n
    return FitNoise(linear, curved), float(covariance_PP[0, 0])


def _best_power(loss: Callable[[float], float]) -> float:
    """The power of the least loss: the best of the grid, or a better one between its neighbours."""
    grid = np.log(POWERS)
    losses = [loss(float(log_power)) for log_power in grid]
    best = int(np.argmin(losses))
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x)) if found.fun < losses[best] else POWERS[best]


def _mixed(logp_N: np.ndarray, unigram_N: np.ndarray) -> tuple[float, float]:
    """The least mean loss of (1 - w) p + w unigram over w in [0, 1], in nats, and its w."""
    p_N = np.maximum(np.exp(logp_N), _LEAST)

    def slope(weight: float) -> float:
        mixture_N = (1 - weight) * p_N + weight * unigram_N
        return float(((p_N - unigram_N) / mixture_N).mean())

    if slope(0.0) >= 0:
        weight = 0.0
    elif slope(1.0) <= 0:
        weight = 1.0
    else:
        weight = float(brentq(slope, 0.0, 1.0, xtol=1e-8))
    return float(-np.log((1 - weight) * p_N + weight * unigram_N).mean()), weight


def frequencies(counts_V: np.ndarray) -> np.ndarray:
    """A unigram from token counts, with one added to every count."""
    smoothed_V: np.ndarray = (counts_V + 1) / (counts_V.sum() + len(counts_V))
    return smoothed_V


def own_unigram(document_N: np.ndarray, label_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """Probability of each token under the unigram of the *other* documents, as for unseen text."""
    counts_V = np.bincount(label_N, minlength=vocab_size)
    lengths_D = np.bincount(document_N)
    _, places_N, own_N = np.unique(document_N * vocab_size + label_N, return_inverse=True, return_counts=True)
    others_N = counts_V[label_N] - own_N[places_N]
    unigram_N: np.ndarray = (others_N + 1) / (len(label_N) - lengths_D[document_N] + vocab_size)
    return unigram_N
