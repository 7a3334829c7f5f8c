"""Is it knowledge or smoothing? Scores after fitting a temperature and a share of unigram on other documents.

A model that merely hedges better than another scores better on foreign text without knowing more of it. Two
cheap repairs, fitted on a domain's validation split and applied to its test split, give every model that
advantage: one temperature, or one temperature and one weight w of (1 - w) p + w unigram. A gain over another
model that is gone afterwards was calibration; what remains is knowledge.

The fit needs no second pass: one forward gives log-probabilities at `POWERS`, and between them every token's
log-probability is a smooth function of the power, so a cubic spline stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq, minimize_scalar

if TYPE_CHECKING:
    from collections.abc import Callable

POWERS = tuple(float(power) for power in np.geomspace(0.2, 3.0, 10))
"""Inverse temperatures at which a forward pass looks: temperatures from 5 down to 1/3."""

FIT_TOKENS = 4096
"""About as many tokens of a domain enter the fit, evenly spread over each document."""

_LEAST = 1e-300


@dataclass(frozen=True, slots=True)
class Fit:
    """What was fitted on a domain's validation split.

    Attributes:
        temperature: of the logits, alone.
        mixed_temperature: of the logits, when mixed with the unigram.
        weight: of the unigram in that mixture, 0 to 1.
        unigram: where the unigram's frequencies come from.
        tokens: how many tokens the fit saw.
    """

    temperature: float
    mixed_temperature: float
    weight: float
    unigram: str
    tokens: int

    @property
    def powers(self) -> tuple[float, float]:
        """The inverse temperatures at which `apply` needs log-probabilities."""
        return 1 / self.temperature, 1 / self.mixed_temperature

    def apply(self, powered_NK: np.ndarray, unigram_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of N tokens: with the temperature alone, and mixed with the unigram.

        Args:
            powered_NK: log-probabilities at `powers`.
            unigram_N: probabilities of the tokens under the unigram.
        """
        alone_N, mixed_N = np.asarray(powered_NK, np.float64).T
        mixture_N = (1 - self.weight) * np.exp(mixed_N) + self.weight * unigram_N
        return alone_N, np.log(np.maximum(mixture_N, _LEAST))


def fit(powered_NK: np.ndarray, unigram_N: np.ndarray, unigram: str) -> Fit:
    """Temperature and mixture that make N tokens most probable.

    The first is convex in the inverse temperature. In the second the weight is convex at each temperature
    and is solved for inside; the temperature's best grid point starts a bounded search around it.

    Args:
        powered_NK: log-probabilities of the tokens at `POWERS`.
        unigram_N: probabilities of the tokens under the unigram, all positive.
        unigram: where those come from, for the record.
    """
    spline = CubicSpline(np.log(POWERS), np.asarray(powered_NK, np.float64), axis=1)
    alone = _best_power(lambda log_power: float(-spline(log_power).mean()))
    mixed = _best_power(lambda log_power: _mixed(spline(log_power), unigram_N)[0])
    return Fit(
        temperature=1 / alone,
        mixed_temperature=1 / mixed,
        weight=_mixed(spline(np.log(mixed)), unigram_N)[1],
        unigram=unigram,
        tokens=len(unigram_N),
    )


def _best_power(loss: Callable[[float], float]) -> float:
    """The power with the least loss: the best of the grid, refined between its neighbours."""
    grid = np.log(POWERS)
    best = int(np.argmin([loss(float(log_power)) for log_power in grid]))
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x))


def _mixed(logp_N: np.ndarray, unigram_N: np.ndarray) -> tuple[float, float]:
    """Least mean loss of (1 - w) p + w unigram over w in [0, 1], in nats, and the w."""
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
    """A unigram from token counts, with one added to every count so that none is zero."""
    smoothed_V: np.ndarray = (counts_V + 1) / (counts_V.sum() + len(counts_V))
    return smoothed_V


def own_unigram(document_N: np.ndarray, label_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """Each token's probability under the unigram of the *other* documents, so that the fit is honest.

    Args:
        document_N: document of each token.
        label_N: the token ids.
        vocab_size: number of ids.
    """
    counts_V = np.bincount(label_N, minlength=vocab_size)
    lengths_D = np.bincount(document_N)
    _, places_N, own_N = np.unique(document_N * vocab_size + label_N, return_inverse=True, return_counts=True)
    others_N = counts_V[label_N] - own_N[places_N]
    unigram_N: np.ndarray = (others_N + 1) / (len(label_N) - lengths_D[document_N] + vocab_size)
    return unigram_N
