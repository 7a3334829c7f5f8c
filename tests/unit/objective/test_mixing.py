from __future__ import annotations

from typing import get_args

import pytest

from tutelage.config import Alpha, ConstantAlpha, PiecewiseAlpha
from tutelage.objective import POLICIES, alpha_at

RAMP = PiecewiseAlpha(policy="piecewise", knots=((0.25, 0.1), (0.5, 0.9), (1.0, 0.0)))


@pytest.mark.parametrize(
    ("policy", "step", "expected"),
    [
        (ConstantAlpha(value=0.4), 0, 0.4),
        (ConstantAlpha(value=0.4), 100, 0.4),
        (RAMP, 0, 0.1),  # flat before the first knot
        (RAMP, 25, 0.1),
        (RAMP, 50, 0.9),
        (RAMP, 75, 0.45),
        (RAMP, 100, 0.0),  # the last step is the end of the run
    ],
)
def test_values_at_the_knots(policy, step, expected):
    assert alpha_at(policy, step, 101) == pytest.approx(expected)


def test_a_run_of_one_step_takes_the_first_value():
    assert alpha_at(RAMP, 0, 1) == pytest.approx(0.1)


def test_every_policy_of_the_config_is_registered_and_documented():
    names = {kind.model_fields["policy"].annotation.__args__[0] for kind in get_args(get_args(Alpha)[0])}
    assert names == set(POLICIES)
    assert all(policy.__doc__ for policy in POLICIES.values())
