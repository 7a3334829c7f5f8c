import math

import numpy as np
import pytest
from scipy import stats

from tutelage.analysis.gains import DrawnDomain, document_draws, drawn_gains, percentile_interval
from tutelage.analysis.stats import (
    Estimate,
    all_of,
    differs,
    exceeds,
    flat_region,
    half_width,
    holm,
    on_front,
    seeds_needed,
    stays_within,
    t_interval,
)


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


def test_many_half_widths_are_those_of_one_interval():
    values = np.random.default_rng(0).normal(0, 1, 4)
    one = t_interval(values)

    many = half_width(np.array([4, 1]), np.array([values.std(ddof=1), np.nan]))

    assert many[0] == pytest.approx(one.high - one.mean)
    assert np.isnan(many[1])


@pytest.mark.parametrize("bound", [0.0, 0.7])
def test_one_sided_p_values_are_those_of_scipy(bound):
    values = np.random.default_rng(1).normal(0.5, 1, 5)
    found = exceeds(values, bound)

    assert found.support == pytest.approx(stats.ttest_1samp(values, bound, alternative="greater").pvalue)
    assert found.contradict == pytest.approx(stats.ttest_1samp(values, bound, alternative="less").pvalue)
    assert differs(values).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert differs(values).contradict == 1.0


def test_equal_differences_are_certain_and_rounding_error_is_no_difference():
    assert exceeds([0.3, 0.3, 0.3]).support == 0.0
    assert exceeds([-0.3, -0.3]).contradict == 0.0
    assert exceeds([1e-15, 2e-15, 3e-15]).p == 1.0


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    values = [0.1, -0.1, 0.05, 0.0]
    lower = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, 0.5, alternative="less").pvalue

    assert stays_within(values, 0.5).support == pytest.approx(max(lower, upper))
    assert stays_within([1.0, 1.1, 0.9], 0.5).contradict < 0.05


@pytest.mark.parametrize("edge", [-0.5, 0.5])
def test_equivalence_is_rarely_found_at_the_edge_of_the_margin(edge):
    rng = np.random.default_rng(5)

    found = np.mean([stays_within(rng.normal(edge, 0.1, 4), 0.5).support < 0.05 for _ in range(2000)])

    assert found < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_all_parts_support_and_one_contradicts():
    whole = all_of([exceeds([1.0, 1.1, 0.9]), exceeds([-1.0, -1.1, -0.9])])

    assert whole.support > 0.9
    assert whole.contradict == pytest.approx(2 * exceeds([-1.0, -1.1, -0.9]).contradict)


def test_holm_is_the_textbook_one():
    # Holm (1979): 0.01 * 4, 0.013 * 3 (kept at least the one before), 0.04 * 2, 0.3
    assert holm([0.04, 0.01, 0.3, 0.013]) == pytest.approx([0.08, 0.04, 0.3, 0.04])
    assert holm([]) == []
    assert holm([0.9, 0.9]) == [1.0, 1.0]


def test_holm_keeps_the_family_wise_error_rate_with_dependent_tests():
    rng = np.random.default_rng(6)
    families, size = 2000, 15
    shared = rng.normal(size=(families, 5, 1))
    data = shared + rng.normal(size=(families, 5, size))  # as with one baseline behind every gain
    p = stats.ttest_1samp(data, 0, axis=1).pvalue

    wrong = np.mean([min(holm(list(row))) <= 0.05 for row in p])

    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)


def test_the_flat_region_holds_what_cannot_be_told_from_the_best():
    gains = np.array([[1.0, 0.9, -3.0], [1.2, 1.4, -2.8], [0.9, 0.8, -3.1]])

    assert flat_region(gains, 0) == [0, 1]
    assert flat_region(gains[:1], 0) == [0, 1, 2]  # one seed tells nothing apart


def test_on_the_front_is_what_no_other_beats_on_both():
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (2.0, 1.0), (0.0, 0.0), (1.0, 2.0), (2.0, 2.0)]
    assert on_front(points) == [True, True, True, False, False, False, True]  # equals do not beat each other


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.3], [0.1, 0.9, 0.2, 0.3], [-1.0, 2.0, 0.5, 0.4, 1.1]])
@pytest.mark.parametrize("level", [0.05, 0.05 / 22])
def test_seeds_needed_is_the_power_of_the_noncentral_t(values, level):
    """As statsmodels' TTestPower computes it: P(T' > t) of the noncentral t with n - 1 degrees of freedom."""
    d = np.mean(values) / np.std(values, ddof=1)

    def power(n):
        return stats.nct.sf(stats.t.isf(level / 2, n - 1), n - 1, d * math.sqrt(n))

    n = seeds_needed(values, 0.0, math.inf, level=level)

    assert n == next(k for k in range(2, 101) if power(k) >= 0.8)
    assert seeds_needed([-value for value in values], -math.inf, 0.0, level=level) == n


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (-0.5, 0.5), (-math.inf, 0.9)])
def test_so_many_seeds_find_it_in_four_of_five_simulated_studies(low, high):
    values = [0.05, 0.5, 0.3, 0.1]
    n = seeds_needed(values, low, high)
    rng = np.random.default_rng(n)

    def found(k):
        drawn = rng.normal(np.mean(values), np.std(values, ddof=1), (20_000, k))
        p = [stats.ttest_1samp(drawn, b, axis=1, alternative=a).pvalue
             for b, a in ((low, "greater"), (high, "less")) if math.isfinite(b)]  # fmt: skip
        return np.mean(np.max(p, axis=0) < 0.025)

    assert found(n) > 0.8 - 0.01  # three standard errors of a proportion over 20,000
    assert n == 2 or found(n - 1) < 0.8 + 0.01


def test_no_effect_needs_more_seeds_than_anybody_has():
    assert seeds_needed([0.1, -0.1, 0.0], 0.0, math.inf) is None
    assert seeds_needed([1.0, 1.0], 0.0, math.inf) == 2


def documents(rng, gain, n=200):
    """Losses of n documents of very different sizes; the expected run loss is `gain` percent lower."""
    base = rng.lognormal(7, 0.8, n)
    return base, base * (1 - gain / 100 + rng.normal(0, 0.05, n))


def paired_document_bootstrap(domains, seed=0, draws=2000):
    """The bootstrap of one run over another."""
    rng = np.random.default_rng(seed)
    tables = [(base[None], run[None], document_draws(len(base), rng, draws)) for base, run in domains]
    drawn = drawn_gains([DrawnDomain(run, base @ drawn, np.array([0]), drawn) for base, run, drawn in tables])
    low, high = percentile_interval(drawn)
    return Estimate(float(drawn[0, 0]), float(low[0]), float(high[0]), sum(len(base) for base, _ in domains))


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
