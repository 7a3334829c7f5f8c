"""Intervals: paired t over seeds, paired bootstrap over documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from tutelage.resampling import DRAWS, resampled_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


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


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Student's t interval for the mean of paired differences, one per seed.

    d +- t(n-1, (1 + confidence) / 2) * s / sqrt(n), with mean d and standard deviation s (n - 1 in the
    denominator) of the n differences. Exact if they are independent and normal.

    Args:
        differences: one number per seed; at least two.
        confidence: coverage, between 0 and 1.

    Raises:
        ValueError: fewer than two differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:  # noqa: PLR2004 - one value has no spread
        raise ValueError(f"a t interval needs at least two differences, got {n}")
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired_document_bootstrap(
    domains: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    seed: int = 0,
    draws: int = DRAWS,
    confidence: float = 0.95,
) -> Estimate:
    """Percentile bootstrap of the gain of one run over another: evaluation noise only.

    The gain on a domain is 100 (1 - sum nll_run / sum nll_base) percent: the relative drop in bits per
    byte, in which the bytes cancel because both runs score the same documents. Each draw takes, within
    each domain, as many documents as there are, with replacement and the same ones for both runs; its
    value is the mean of the domains' gains. The interval runs between the (1 -+ confidence) / 2
    quantiles of the draws. It says nothing of how another training seed would have come out.

    Args:
        domains: per domain, the losses in nats of the same documents, (base, run), shape [documents].
        seed: seed of the draws.
        draws: number of draws.
        confidence: coverage, between 0 and 1.

    Returns:
        Gain in percent, positive if the run needs fewer bits; `n` counts documents.

    Raises:
        ValueError: no domain, an empty one, or two lengths that differ.
    """
    if not domains or any(len(base) != len(run) or len(base) == 0 for base, run in domains):
        raise ValueError("every domain needs the losses of the same documents, at least one, for both runs")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    mean = 0.0
    for base, run in domains:
        base_sum, run_sum = resampled_sums(np.stack([base, run], axis=1), rng, draws).T
        drawn += 100 * (1 - run_sum / base_sum) / len(domains)
        mean += 100 * (1 - float(run.sum() / base.sum())) / len(domains)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(mean, float(low), float(high), sum(len(base) for base, _ in domains))
