"""The laws against measured and recomputed numbers, and the ranges that they hold in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.planner.laws import PUBLISHED, PUBLISHED_RANGE, PUBLISHED_TAUGHT

CHECKED = [
    (143e6, 3.7e9, 1.8953, 2.7548, 2.8496, 2.7576),
    (143e6, 3.7e9, 2.3705, 2.7348, 2.8496, 2.7354),
    (198e6, 4.9e9, 2.2917, 2.6509, 2.7585, 2.6568),
    (546e6, 12.3e9, 2.1720, 2.4289, 2.5007, 2.4317),
    (546e6, 98.5e9, 2.5038, 2.5027, 2.3246, 2.5062),
    (975e6, 21.3e9, 2.2917, 2.3618, 2.3708, 2.3593),
    (1.82e9, 38.9e9, 1.8953, 2.2020, 2.2446, 2.1942),
    (1.82e9, 38.9e9, 2.6073, 2.5837, 2.2446, 2.6073),
    (7.75e9, 514.9e9, 1.8953, 1.9595, 1.9326, 1.9372),
]
"""N, D, L_T, measured L_S, L~, the law's L_S, computed elsewhere from measurements of arXiv 2502.08606."""


@pytest.mark.parametrize(("n", "d", "teacher", "measured", "alone", "taught"), CHECKED)
def test_laws_give_the_numbers_that_were_computed_elsewhere(n, d, teacher, measured, alone, taught):
    assert float(PUBLISHED.loss(n, d)) == pytest.approx(alone, abs=1e-3)
    found = float(PUBLISHED_TAUGHT.loss(n, d, teacher, PUBLISHED.loss(n, d)))
    assert found == pytest.approx(taught, abs=1e-3)
    assert abs(found - measured) < 0.036  # the largest error over the points it was fitted to
    direct = (
        teacher
        + teacher**-2.3661
        * (1 + (teacher / (alone * 1.6398)) ** (1 / 0.10121)) ** -303.63
        * (512077 / n**0.57616 + 611331 / d**0.51648) ** 0.49364
    )
    assert found == pytest.approx(direct, abs=1e-3)


def test_root_mean_square_of_the_checked_points_is_that_of_points_that_were_not_fitted():
    n, d, teacher, measured, alone, _ = np.array(CHECKED).T
    errors = PUBLISHED_TAUGHT.loss(n, d, teacher, alone) - measured
    assert math.sqrt(np.mean(errors**2)) < 0.018


def test_what_is_outside_of_a_range_is_said():
    assert PUBLISHED_RANGE.outside(1.14e9, 50e9) is None
    assert PUBLISHED_RANGE.outside(50e3, 50e9) == (
        "outside: 50K parameters without embeddings; known: 143M to 12.6B, English web text, arXiv 2502.08606"
    )
    assert "1.25M tokens" in PUBLISHED_RANGE.outside(1.14e9, 1.25e6)
