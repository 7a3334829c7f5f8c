"""What an interval contains: simulated studies whose noise is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tutelage.analysis.stats import text_spread

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "studies" / "interval_coverage.py"
SPEC = importlib.util.spec_from_file_location("interval_coverage", SCRIPT)
simulation = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = simulation  # dataclasses look their module up
SPEC.loader.exec_module(simulation)
STUDIES = 300
ALLOWED = 3 * (0.05 * 0.95 / STUDIES) ** 0.5
"""Three standard errors of a coverage of 95%."""


def simulated(seeds, *, own=True, baselines=1, texts=4, **noise):
    rng = np.random.default_rng([seeds, own, baselines])
    gains = simulation.simulate(
        STUDIES, seeds, texts, simulation.Noise(**noise), rng, own=own, baselines=baselines
    )
    return simulation.coverage(gains)


@pytest.mark.parametrize("baselines", [1, 2])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_with_a_teacher_for_each_seed_the_intervals_hold_what_teachers_add(seeds, baselines):
    assert simulated(seeds, baselines=baselines)[0] == pytest.approx(0.95, abs=ALLOWED)


@pytest.mark.parametrize("seeds", [5, 10])
def test_with_one_teacher_for_all_seeds_they_do_not(seeds):
    assert simulated(seeds, own=False)[0] < 0.85


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_with_texts_as_a_sample_hold_on_other_texts(seeds):
    over_seeds, with_texts, _ = simulated(seeds, text=1.5)
    assert with_texts > 0.95 - ALLOWED
    assert over_seeds < with_texts - 0.03


def test_a_second_untaught_run_takes_a_quarter_of_the_variance():
    one, two = (simulated(10, teacher=0.0, both=0.0, baselines=n)[2] for n in (1, 2))

    # s^2 = .25 of student and of untaught run each, less a little for a gain is a ratio: 2 s^2 and 1.5 s^2
    assert one == pytest.approx(0.5, rel=0.06)
    assert two == pytest.approx(0.375, rel=0.06)


def test_the_spread_over_texts_by_hand():
    (spread,) = text_spread(np.array([[[1.0, 4.0, 1.0], [2.0, 5.0, 2.0]]]))

    # means over seeds 1.5, 4.5, 1.5; over texts 2, 3
    assert (spread.n, spread.least, spread.most) == (3, 1.5, 3.0)
    assert spread.deviation == pytest.approx(3**0.5)
    parts = np.array([0.5 / 2, 3 / 3])
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * parts.sum() ** 0.5
    assert (spread.low, spread.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert text_spread(np.array([[[1.0, 2.0]]]))[0].high == np.inf
