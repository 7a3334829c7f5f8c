"""Bootstrap intervals cover at their nominal rate, and depend on the documents alone."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.bootstrap import DRAWS, ratio_interval, resampled_sums
from tutelage.evals.token_scores import ratio

REPLICATES = 400


@pytest.mark.parametrize("documents", [20, 50])
def test_coverage_on_documents_of_known_variance(documents):
    """Bits per byte 1.5 with a standard deviation of 60 bits a document of 500 to 1500 bytes.

    The percentile interval undercovers by about 1/n; stated bound: 95% less 4 points at 20 documents (less
    3 at 50), with 3.5 standard errors of 400 replicates (1.1 points each) of luck.
    """
    rng = np.random.default_rng(1)
    covered, spread, widths = 0, [], []
    for _ in range(REPLICATES):
        size = rng.integers(500, 1500, documents)
        bits = 1.5 * size + rng.normal(0, 60, documents)
        low, high = ratio_interval(bits, size)
        covered += low <= 1.5 <= high
        spread.append(bits.sum() / size.sum())
        widths.append(high - low)
    short = 0.04 if documents == 20 else 0.03
    assert 0.95 - short - 0.038 <= covered / REPLICATES <= 0.95 + 0.038
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(spread), rel=0.12)


def test_confidence_is_the_coverage():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(REPLICATES):
        size = rng.integers(500, 1500, 40)
        low, high = ratio_interval(1.5 * size + rng.normal(0, 60, 40), size, confidence=0.5)
        covered += low <= 1.5 <= high
    assert covered / REPLICATES == pytest.approx(0.5, abs=0.1)


def test_the_interval_agrees_with_the_standard_error():
    rng = np.random.default_rng(3)
    size = rng.integers(500, 1500, 200)
    found = ratio(1.5 * size + rng.normal(0, 60, 200), size)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.stderr, rel=0.1)


def test_order_does_not_matter_and_content_does():
    rng = np.random.default_rng(4)
    size = rng.integers(500, 1500, 30)
    bits = 1.5 * size + rng.normal(0, 60, 30)
    order = rng.permutation(30)
    assert ratio_interval(bits, size) == ratio_interval(bits[order], size[order])
    assert ratio_interval(bits, size) != ratio_interval(bits + 1, size)


def test_sums_are_over_as_many_documents_as_there_are():
    columns = np.stack([np.ones(7), np.arange(7.0)], 1)
    sums = resampled_sums(columns, np.random.default_rng(0))
    assert sums.shape == (DRAWS, 2)
    assert (sums[:, 0] == 7).all()
    assert sums[:, 1].mean() == pytest.approx(21, rel=0.02)
    assert sums[:, 1].var() == pytest.approx(7 * 4, rel=0.15)
