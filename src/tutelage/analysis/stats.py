"""Intervals and tests over seeds (paired t, equivalence, Holm's correction, flat regions), and over texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from scipy import special  # scipy.stats has the same functions and takes a second to import

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

DIGITS = 9
"""Differences are rounded to this many digits: less is rounding error, which would look like certainty."""
MOST_SEEDS = 100
"""More are not looked at."""
_NODES = 100
POWER = 0.8
"""Chance of finding an effect of the size that is seen with the number of seeds that is said to be needed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: point estimate.
        low: lower end.
        high: upper end.
        n: independent units behind the interval (seeds, or documents).
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """One-sided p-values for and against a statement about the mean.

    Attributes:
        support: one-sided p value against "the statement is false"; small speaks for it.
        contradict: one-sided p value against "the statement is true"; small speaks against it.
    """

    support: float
    contradict: float

    @property
    def p(self) -> float:
        """Two-sided p value: twice the smaller one."""
        return min(1.0, 2 * min(self.support, self.contradict))


def t_interval(differences: ArrayLike) -> Estimate:
    """Student's 95% t interval for the mean of paired differences, one per seed.

    d +- t(n-1, 0.975) * s / sqrt(n), with mean d and standard deviation s (n - 1 in the
    denominator) of the n differences. Exact if they are independent and normal.

    Args:
        differences: one number per seed; at least two.

    Raises:
        ValueError: fewer than two differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:  # noqa: PLR2004 - one value has no spread
        raise ValueError(f"a t interval needs at least two differences, got {n}")
    mean = float(values.mean())
    half = float(half_width(np.array([n]), np.array([values.std(ddof=1)]))[0])
    return Estimate(mean, mean - half, mean + half, n)


def half_width(n: NDArray[np.int64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of the 95% t interval of many means at once; NaN for n = 1.

    Args:
        n: number of differences behind each mean.
        deviation: their standard deviation (n - 1 in the denominator).
    """
    wide: NDArray[np.float64] = special.stdtrit(n - 1, 0.975) * deviation / np.sqrt(n)
    return wide


def exceeds(differences: ArrayLike, bound: float = 0.0) -> Evidence:
    """One-sided t tests of "the mean is above `bound`".

    Args:
        differences: one number per seed; at least two.
        bound: what the mean is compared with.
    """
    values = np.round(np.asarray(differences, dtype=np.float64) - bound, DIGITS)
    n, mean, error = len(values), float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    if error == 0.0:
        support = 0.5 if mean == 0.0 else float(mean < 0)
        return Evidence(support, 1 - support)
    t = mean / error
    return Evidence(float(special.stdtr(n - 1, -t)), float(special.stdtr(n - 1, t)))


def stays_within(differences: ArrayLike, margin: float) -> Evidence:
    """Two one-sided t tests (Schuirmann 1987) of "the mean is between -margin and margin".

    Args:
        differences: one number per seed; at least two.
        margin: half the width of what counts as no difference; positive.
    """
    above, below = exceeds(differences, -margin), exceeds(differences, margin)
    return Evidence(max(above.support, below.contradict), min(above.contradict, below.support))


def differs(differences: ArrayLike) -> Evidence:
    """Two-sided t test of "the mean is not 0"; nothing can contradict that."""
    one = exceeds(differences)
    return Evidence(min(one.support, one.contradict), 1.0)


def all_of(parts: Sequence[Evidence]) -> Evidence:
    """Evidence for the conjunction: all parts must be supported, any part can contradict (Bonferroni)."""
    return Evidence(
        max(part.support for part in parts), min(1.0, len(parts) * min(part.contradict for part in parts))
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values: rejecting those at most a keeps the family-wise error rate at a.

    Args:
        p_values: one per comparison of the family.

    Returns:
        Adjusted p values in the same order.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def flat_region(gains_SA: NDArray[np.float64], best: int) -> list[int]:
    """Columns that cannot be told from the best: paired two-sided t tests over seeds at 5%, uncorrected.

    Args:
        gains_SA: gain by seed and alpha. With one seed nothing can be told apart.
        best: column of the best.

    Returns:
        Column numbers, `best` among them.
    """
    seeds, columns = gains_SA.shape
    if seeds < 2:  # noqa: PLR2004 - one value has no spread
        return list(range(columns))
    return [
        column
        for column in range(columns)
        if column == best or differs(gains_SA[:, best] - gains_SA[:, column]).p > 0.05  # noqa: PLR2004
    ]


def chance_inside(
    n: NDArray[np.int64], mean: float, deviation: float, low: float, high: float, level: float
) -> NDArray[np.float64]:
    """Chance that a t interval lies between two bounds, if differences are normal.

    With the sample deviation S = deviation sqrt(V / (n - 1)), V of the chi-squared distribution, the interval
    mean +- t S / sqrt(n) lies inside with a probability that is a normal one for each V; its expectation is
    taken by Gauss-Legendre quadrature over the quantiles of V. With one bound infinite this is the noncentral
    t distribution.

    Args:
        n: numbers of seeds, each at least two.
        mean: of the differences.
        deviation: of the differences, positive.
        low: lower bound; may be minus infinity.
        high: upper bound; may be infinity.
        level: one minus the confidence of the interval, so that each bound is tested at half of it.

    Returns:
        One probability per entry of `n`.
    """
    spread_NQ = _chi_table()[n] * -special.stdtrit(n - 1, level / 2)[:, None]
    root_N1 = np.sqrt(n)[:, None] / deviation
    inside_NQ = special.ndtr((high - mean) * root_N1 - spread_NQ) - special.ndtr(
        (low - mean) * root_N1 + spread_NQ
    )
    chance_N: NDArray[np.float64] = np.maximum(inside_NQ, 0) @ (_legendre()[1] / 2)
    return chance_N


@cache
def _legendre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights of the quadrature."""
    nodes_Q, weights_Q = np.polynomial.legendre.leggauss(_NODES)
    return nodes_Q, weights_Q


@cache
def _chi_table() -> NDArray[np.float64]:
    """sqrt(V / (n - 1)) at the nodes of the quadrature, for every number of seeds; rows 0 and 1 are void."""
    nodes_Q = (_legendre()[0] + 1) / 2
    df_N1 = np.maximum(np.arange(MOST_SEEDS + 1)[:, None] - 1, 1)
    table: NDArray[np.float64] = np.sqrt(2 * special.gammaincinv(df_N1 / 2, nodes_Q) / df_N1)
    return table


def seeds_needed(
    differences: ArrayLike,
    low: float,
    high: float,
    *,
    level: float = 0.05,
    power: float = POWER,
) -> int | None:
    """Seeds that would show the mean between two bounds in four of five studies.

    Mean and spread are taken to be what they are in `differences`.

    Args:
        differences: one number per seed; at least two.
        low: lower bound; may be minus infinity.
        high: upper bound; may be infinity.
        level: two-sided level of the test of each bound.
        power: chance to show it.

    Returns:
        The smallest number of at least 2 with that power; None if a hundred would not do.
    """
    values = np.asarray(differences, dtype=np.float64)
    deviation = max(float(values.std(ddof=1)), 10.0**-DIGITS)
    n = np.arange(2, MOST_SEEDS + 1)
    enough = chance_inside(n, float(values.mean()), deviation, low, high, level) >= power
    return int(n[enough.argmax()]) if enough.any() else None


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other point beats on one coordinate without losing on the other."""
    return [not any(x >= one[0] and y >= one[1] and (x, y) != one for x, y in points) for one in points]


@dataclass(frozen=True, slots=True)
class TextSpread:
    """How much an out-of-domain mean depends on which texts it is over.

    Attributes:
        n: texts.
        deviation: standard deviation of the texts' gains, each a mean over seeds, in percentage points.
        least: the smallest mean over all texts but one.
        most: the largest.
        low: lower end of a 95% interval in which seeds and texts are both samples; -inf for one seed.
        high: upper end.
    """

    n: int
    deviation: float
    least: float
    most: float
    low: float
    high: float


def text_spread(gains_CST: NDArray[np.float64]) -> list[TextSpread]:
    """Spread of the mean of gains by seed and text, of each of C arms.

    The variance of the mean is at most s_S^2 / S + s_T^2 / T, with s_S the standard deviation over seeds of
    the means over texts, s_T that over texts of the means over seeds. What seeds and texts do together is in
    both, so the interval is a little wide. Degrees of freedom by Satterthwaite (1946).

    Args:
        gains_CST: shape [C, S, T], at least two texts.
    """
    arms, seeds, texts = gains_CST.shape
    of_texts_CT = gains_CST.mean(axis=1)
    mean_C, deviation_C = of_texts_CT.mean(axis=1), of_texts_CT.std(axis=1, ddof=1)
    others_CT = (of_texts_CT.sum(axis=1, keepdims=True) - of_texts_CT) / (texts - 1)
    half_C = np.full(arms, inf)
    if seeds > 1:
        of_seeds_C = gains_CST.mean(axis=2).var(axis=1, ddof=1) / seeds
        parts_C2 = np.stack([of_seeds_C, deviation_C**2 / texts], axis=1)
        whole_C = parts_C2.sum(axis=1)
        same_C = whole_C == 0
        freedom_C = whole_C**2 / np.where(same_C, 1, (parts_C2**2 / [seeds - 1, texts - 1]).sum(axis=1))
        wide_C = special.stdtrit(np.where(same_C, 1, freedom_C), 0.975) * np.sqrt(whole_C)
        half_C = np.where(same_C, 0, wide_C)
    columns_C5 = (deviation_C, others_CT.min(axis=1), others_CT.max(axis=1), mean_C - half_C, mean_C + half_C)
    return [TextSpread(texts, *map(float, row)) for row in zip(*columns_C5, strict=True)]
