import math

import numpy as np
import pytest

from tutelage.analysis.stats import paired_document_bootstrap, t_interval


def test_t_interval_is_the_textbook_one():
    estimate = t_interval([1.0, 2.0, 3.0])

    # t(2, 0.975) = 4.302653 from the tables, s = 1
    assert estimate.mean == 2.0
    assert estimate.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - estimate.low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate.n == 3


def test_t_interval_of_one_difference_is_refused():
    with pytest.raises(ValueError, match="at least two differences, got 1"):
        t_interval([1.0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_t_interval_covers_the_truth_as_often_as_it_says(n):
    rng = np.random.default_rng(1)
    intervals = [t_interval(rng.normal(0.3, 2.0, n)) for _ in range(2000)]

    covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])

    assert abs(covered - 0.95) < 0.015  # three standard errors of a proportion over 2000


def documents(rng, gain, n=200):
    """Losses of n documents of very different sizes; the expected run loss is `gain` percent lower."""
    base = rng.lognormal(7, 0.8, n)
    return base, base * (1 - gain / 100 + rng.normal(0, 0.05, n))


def test_bootstrap_point_estimate_is_the_ratio_of_sums():
    base, run = np.array([100.0, 300.0]), np.array([90.0, 300.0])

    estimate = paired_document_bootstrap([(base, run)])

    assert estimate.mean == pytest.approx(100 * 10 / 400)
    assert estimate.low == pytest.approx(0.0)  # twice the second document
    assert estimate.high == pytest.approx(10.0)  # twice the first
    assert estimate.n == 2


def test_bootstrap_over_domains_averages_their_relative_gains():
    small = (np.array([10.0, 10.0]), np.array([9.0, 9.0]))
    large = (np.array([1000.0]), np.array([1040.0]))

    estimate = paired_document_bootstrap([small, large])

    assert estimate.mean == pytest.approx((10 - 4) / 2)
    assert estimate.low == pytest.approx(3.0)  # every draw is the same: documents agree within domains
    assert estimate.high == pytest.approx(3.0)


def test_bootstrap_resamples_the_same_documents_for_both_runs():
    rng = np.random.default_rng(2)
    base, _ = documents(rng, 0)

    estimate = paired_document_bootstrap([(base, 0.98 * base)])

    assert estimate.high - estimate.low < 1e-9


def test_bootstrap_repeats_itself():
    pair = documents(np.random.default_rng(3), 1.0)

    assert paired_document_bootstrap([pair], seed=5) == paired_document_bootstrap([pair], seed=5)
    assert paired_document_bootstrap([pair], seed=5) != paired_document_bootstrap([pair], seed=6)


@pytest.mark.parametrize("gain", [0.0, 2.0])
def test_bootstrap_covers_the_truth_about_as_often_as_it_says(gain):
    """With gain 0 this is the false-positive rate: an interval without 0 is a wrong claim."""
    rng = np.random.default_rng(4)
    intervals = [
        paired_document_bootstrap([documents(rng, gain), documents(rng, gain)], seed=i, draws=300)
        for i in range(400)
    ]

    missed = np.mean([not i.low <= gain <= i.high for i in intervals])

    assert 0.02 < missed < 0.09  # nominal 0.05; heavy-tailed sizes make the percentile interval a bit short


@pytest.mark.parametrize("domains", [[], [(np.array([]), np.array([]))], [(np.ones(3), np.ones(2))]])
def test_bootstrap_refuses_domains_that_do_not_pair(domains):
    with pytest.raises(ValueError, match="same documents"):
        paired_document_bootstrap(domains)
