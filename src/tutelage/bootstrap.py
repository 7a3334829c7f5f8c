"""Bootstrap over documents, the independent units of an evaluation; shared by evals and analysis."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DRAWS = 2000
"""Bootstrap draws: the ends of a 95% interval are then good to about 3% of its width."""

_BLOCK = 2**22


def content_order(columns_NC: NDArray[np.float64]) -> tuple[NDArray[np.float64], np.random.Generator]:
    """The rows in an order of their own, and a generator seeded by the last column in that order.

    So an interval is a function of the documents and not of the order in which they came.
    """
    rows_NC = columns_NC[np.lexsort(columns_NC.T)]
    seed = hashlib.sha256(np.ascontiguousarray(rows_NC[:, -1]).tobytes()).digest()
    return rows_NC, np.random.default_rng(int.from_bytes(seed[:8], "little"))


def resampled_sums(
    columns_NC: NDArray[np.float64], rng: np.random.Generator, draws: int = DRAWS
) -> NDArray[np.float64]:
    """Column sums over N documents drawn with replacement, once per draw; all columns share the draw.

    Args:
        columns_NC: one row per document.
        rng: source of the draws.
        draws: number of draws.

    Returns:
        Sums, shape [draws, C].
    """
    n = len(columns_NC)
    sums = []
    for start in range(0, draws, max(1, _BLOCK // n)):
        picks = rng.integers(n, size=(min(draws - start, max(1, _BLOCK // n)), n))
        places = picks + n * np.arange(len(picks))[:, None]
        weights = np.bincount(places.ravel(), minlength=picks.size).reshape(picks.shape)
        sums.append(weights @ columns_NC)
    return np.concatenate(sums)


def ratio_interval(
    numerator_N: NDArray[np.float64], denominator_N: NDArray[np.float64], confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled documents.

    Args:
        numerator_N: one number per document.
        denominator_N: its weight, for example bytes; positive.
        confidence: coverage, between 0 and 1.
    """
    rows_NC, rng = content_order(np.stack([numerator_N, denominator_N], axis=1).astype(np.float64))
    sums = resampled_sums(rows_NC, rng)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
