"""The choice of texts as a source of noise: what an out-of-domain mean would be on other texts."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from tutelage.analysis.gains import Fit, Gains

_ENOUGH = 2


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


def text_spread(gains_ST: NDArray[np.float64]) -> TextSpread:
    """The spread of the mean of gains by seed and text.

    The variance of the mean is at most s_S^2 / S + s_T^2 / T, with s_S the standard deviation over seeds of
    the means over texts, s_T that over texts of the means over seeds. What seeds and texts do together is in
    both, so the interval is a little wide. Degrees of freedom by Satterthwaite (1946).

    Args:
        gains_ST: shape [S, T], at least two texts.
    """
    seeds, texts = gains_ST.shape
    of_texts_T = gains_ST.mean(axis=0)
    mean, deviation = float(of_texts_T.mean()), float(of_texts_T.std(ddof=1))
    others_T = (of_texts_T.sum() - of_texts_T) / (texts - 1)
    half = inf
    if seeds >= _ENOUGH:
        parts = np.array([gains_ST.mean(axis=1).var(ddof=1) / seeds, deviation**2 / texts])
        whole = float(parts.sum())
        half = 0.0
        if whole > 0:
            freedom = whole**2 / float((parts**2 / [seeds - 1, texts - 1]).sum())
            half = float(stats.t.ppf(0.975, freedom) * np.sqrt(whole))
    return TextSpread(
        texts, deviation, float(others_T.min()), float(others_T.max()), mean - half, mean + half
    )


def text_spreads(gains: Gains) -> Mapping[int, Mapping[Fit, TextSpread]]:
    """Spread of the out-of-domain test gain of every cell and fit that has two texts, by cell.

    Only seeds with all texts count.
    """
    rows = gains.domains.filter(split="test", role="out_of_domain").sort("cell", "fit", "seed", "domain")
    found: dict[int, dict[Fit, TextSpread]] = {}
    for (cell, fit), part in rows.partition_by("cell", "fit", as_dict=True, maintain_order=True).items():
        texts = part["domain"].n_unique()
        whole = part.filter(pl.len().over("seed") == texts)
        if texts >= _ENOUGH and whole.height:
            table = whole["gain"].to_numpy().reshape(-1, texts)
            found.setdefault(int(cell), {})[fit] = text_spread(table)
    return found
