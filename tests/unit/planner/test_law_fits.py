"""Laws are found again from points of known coefficients, and intervals hold as much as they say."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from scipy.optimize import minimize

from tutelage.planner.law_fits import fit_distillation, fit_supervised
from tutelage.planner.law_spread import LawSpread, slopes
from tutelage.planner.laws import OF_EXPONENTS, PUBLISHED, DistillationLaw, SupervisedLaw

SIZES = np.repeat([20e3, 50e3, 150e3, 400e3], 3)
BUDGETS = np.tile([250e3, 1.25e6, 3.75e6], 4)


def test_all_coefficients_are_found_again():
    known = SupervisedLaw(0.9, 500.0, 0.35, 4e4, 0.5, 0.6)  # far from the published ones
    found = fit_supervised(SIZES, BUDGETS, known.loss(SIZES, BUDGETS))
    assert found.free == 6
    assert astuple(found.law) == pytest.approx(astuple(known), rel=1e-4)
    assert found.error < 1e-6


def test_exponents_of_which_points_say_little_are_near_the_published_ones():
    """With two budgets any exponent of tokens fits; between them the law was off by 6.7%."""
    known, sizes = SupervisedLaw(1.3, 400.0, 0.37, 2e3, 0.45, 0.5), np.repeat([2e4, 5e4, 1.5e5, 4e5], 2)
    budgets = np.tile([250e3, 3.75e6], 4)
    for seed in (3, 5):
        noise = np.random.default_rng(seed).normal(0, 0.005, 8)
        found = fit_supervised(sizes, budgets, known.loss(sizes, budgets) * np.exp(noise))
        assert found.free == 6
        assert found.law.loss(9e4, 1e6) == pytest.approx(known.loss(9e4, 1e6), rel=0.01)


def test_an_outlier_does_not_move_the_law():
    known = SupervisedLaw(1.5, PUBLISHED.A, PUBLISHED.a, PUBLISHED.B, PUBLISHED.b, PUBLISHED.g)
    losses = known.loss(SIZES, BUDGETS)
    losses[4] *= 1.05
    found = fit_supervised(SIZES, BUDGETS, losses)
    assert np.delete(found.residuals, 4) == pytest.approx(0, abs=4e-3)
    assert found.residuals[4] > 0.04


def test_no_other_law_is_nearer_to_points_that_no_law_fits():
    """Huber's loss by its definition; the search stopped up to 40% above its minimum."""
    scatter = np.random.default_rng(7).normal(0, 0.02, 12)
    losses = SupervisedLaw(1.2, 300.0, 0.45, 2000.0, 0.45, 0.6).loss(SIZES, BUDGETS) * np.exp(scatter)
    found = fit_supervised(SIZES, BUDGETS, losses)
    assert found.free == 6

    def loss(x):
        off = np.log(SupervisedLaw(*np.exp(x)).loss(SIZES, BUDGETS) / losses)
        unusual = (x - np.log(astuple(PUBLISHED)))[[2, 4, 5]] / OF_EXPONENTS
        size = np.abs([*off, *(0.005 * unusual)])
        return np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()

    ours = np.log(astuple(found.law))
    least = minimize(
        loss, ours, method="Nelder-Mead", options={"maxfev": 9000, "xatol": 1e-7, "fatol": 1e-13}
    )
    assert loss(ours) == pytest.approx(least.fun, rel=0.01)


def test_few_points_fit_three_coefficients_and_fewer_none():
    losses = PUBLISHED.loss(SIZES, BUDGETS)
    assert fit_supervised(SIZES[:6], BUDGETS[:6], losses[:6]).free == 3
    assert fit_supervised(SIZES[:4], BUDGETS[:4], losses[:4]) is None
    assert fit_distillation(*[losses[:10]] * 5) is None


def test_a_corner_that_the_points_leave_open_has_a_wide_interval():
    """Of models with 20 tokens a parameter each, parameters and tokens can change places in the law."""
    known, n = SupervisedLaw(1.3, 400.0, 0.37, 2e3, 0.45, 0.5), np.geomspace(2e4, 4e5, 7)
    losses = known.loss(n, 20 * n) * np.exp(np.random.default_rng(0).normal(0, 0.005, 7))
    found = fit_supervised(n, 20 * n, losses)
    spread = LawSpread.of(found, n, 20 * n)
    off = {
        place: abs(found.law.loss(*place) / known.loss(*place) - 1) for place in ((9e4, 1.8e6), (2e4, 8e6))
    }
    assert off[9e4, 1.8e6] <= spread.at(9e4, 1.8e6) <= 1.5 * found.half_width
    assert 10 * found.half_width < off[2e4, 8e6] <= spread.at(2e4, 8e6)
    more = known.loss(2e4, 8e6) / known.loss(2e4, 4e5) - found.law.loss(2e4, 8e6) / found.law.loss(2e4, 4e5)
    assert 0.1 < abs(more) <= spread.between(2e4, 4e5, 8e6)


def test_corners_of_a_grid_are_little_less_sure_than_its_middle():
    losses = PUBLISHED.loss(SIZES, BUDGETS) * np.exp(np.random.default_rng(0).normal(0, 0.005, 12))
    found = fit_supervised(SIZES, BUDGETS, losses)
    spread = LawSpread.of(found, SIZES, BUDGETS)
    assert found.half_width < spread.at(9e4, 1e6) < spread.at(2e4, 3.75e6) < 1.6 * found.half_width


def test_the_slopes_of_a_spread_are_those_of_the_law():
    """By finite differences: E, the parts at the middle, and the logarithms of the exponents."""
    law, middle, place = SupervisedLaw(1.3, 400.0, 0.37, 2e3, 0.45, 0.5), (9e4, 1e6), (3e4, 4e6)

    def log_loss(shift):
        part_n = law.A / middle[0] ** law.a + shift[1]
        part_d = law.B / middle[1] ** law.b + shift[2]
        a, b, g = law.a * np.exp(shift[3]), law.b * np.exp(shift[4]), law.g * np.exp(shift[5])
        moved = SupervisedLaw(
            law.irreducible + shift[0], part_n * middle[0] ** a, a, part_d * middle[1] ** b, b, g
        )
        return np.log(moved.loss(*place))

    steps = 1e-6 * np.eye(6)
    expected = [(log_loss(step) - log_loss(-step)) / 2e-6 for step in steps]
    found = slopes(law, middle, *(np.array([value]) for value in place))[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_intervals_hold_as_many_new_points_as_they_say():
    random, known = np.random.default_rng(0), SupervisedLaw(1.3, 400.0, 0.408, 2e3, 0.431, 0.452)
    inside, trials = 0, 60
    for _ in range(trials):
        n, d = 10 ** random.uniform(4.3, 5.6, 7), 10 ** random.uniform(5.4, 6.6, 7)
        losses = known.loss(n, d) * np.exp(random.normal(0, 0.01, 7))
        found = fit_supervised(n[:6], d[:6], losses[:6])
        spread = LawSpread.of(found, n[:6], d[:6])
        inside += abs(losses[6] / found.law.loss(n[6], d[6]) - 1) <= spread.at(n[6], d[6])
    assert inside / trials >= 0.9


@pytest.mark.slow
def test_the_distillation_law_is_found_again():
    known, random = DistillationLaw(2.0, 200.0, 0.12, 1.5, 3e5, 0.55, 4e5, 0.5, 0.5), np.random.default_rng(1)
    n = 10 ** random.uniform(8.16, 9.9, 40)
    d, teachers = n * 10 ** random.uniform(1.2, 2.5, 40), random.uniform(1.9, 2.6, 40)
    alone = PUBLISHED.loss(n, d)
    found = fit_distillation(n, d, teachers, alone, known.loss(n, d, teachers, alone))
    assert found.law.loss(n, d, teachers, alone) == pytest.approx(known.loss(n, d, teachers, alone), abs=1e-3)
    assert found.error < 1e-3
