"""Learning rates that rise, stay and fall without a jump, and what is refused because it could not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.config.load import validate
from tutelage.config.run_config import OptimConfig, RunConfig
from tutelage.errors import UserError
from tutelage.train.optim import learning_rate

BASE = {"model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "10K", "global_batch_tokens": 256}
STEPS = 39  # whole batches of 10,000 tokens


def refused(**changes):
    with pytest.raises(UserError) as caught:
        validate(RunConfig, BASE | changes, "run.yaml")
    return str(caught.value)


def judged(config, step, steps, batch):
    """The rate over its peak, from the words of the documentation: three parts, each a formula of its own."""
    tokens = {"2K": 2_000, "0": 0}.get(config.warmup)
    rise = math.ceil(config.warmup * steps if tokens is None else tokens / batch)
    if step + 1 <= rise:
        return (step + 1) / rise
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        rest = steps - rise  # its first step is at the peak, its last at final_lr
        done = (step - rise) / (rest - 1) if rest > 1 else 0.0
        return config.final_lr + (1 - config.final_lr) * math.cos(done * math.pi / 2) ** 2
    fall = max(1, round(config.decay * steps)) if config.decay > 0 else 0
    fall = min(fall, steps - rise)
    left = steps - 1 - step
    return 1.0 if left >= fall else config.final_lr + (1 - config.final_lr) * left / fall


@settings(max_examples=300, deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.5, 0.7, "2K", "0"]),
    decay=st.sampled_from([0.0, 0.01, 0.2, 0.3, 0.5]),
    final=st.sampled_from([0.0, 0.1, 1.0]),
    steps=st.integers(9, 200),
)
def test_the_rate_is_what_the_words_say_and_never_jumps(schedule, warmup, decay, final, steps):
    if schedule == "wsd" and not isinstance(warmup, str) and warmup + decay > 1:
        return
    config = OptimConfig(schedule=schedule, warmup=warmup, decay=decay, final_lr=final)
    config.check_fits(steps, 512)
    rates = [learning_rate(config, 1.0, step, steps, batch_tokens=512) for step in range(steps)]
    assert rates == pytest.approx([judged(config, step, steps, 512) for step in range(steps)], abs=1e-12)
    rise = config.warmup_steps(steps, 512)
    fall = steps - config.decay_start(steps, 512) if schedule == "wsd" else (steps - rise) / 2
    slope = max(1 / max(1, rise), 1 / max(1, fall) * (math.pi / 2 if schedule == "cosine" else 1))
    assert max(abs(b - a) for a, b in pairwise(rates)) <= slope + 1e-12
    assert max(rates) == pytest.approx(1.0)


def test_a_warm_up_of_so_many_hundredths_has_so_many_of_a_hundred_steps():
    for hundredths in range(101):
        config = OptimConfig(warmup=hundredths / 100)
        assert [config.warmup_steps(100 * n, 256) for n in (1, 2, 7)] == [n * hundredths for n in (1, 2, 7)]
        assert config.warmup_steps(101, 256) == hundredths + (hundredths > 0)


def test_the_two_cases_of_the_list():
    said = refused(optim={"schedule": "wsd", "warmup": 0.5, "decay": 0.8})
    assert "warmup (0.5) and decay (0.8) take 1.3 of the run" in said
    said = refused(optim={"warmup": "20K"})
    assert "optim.warmup = 20K takes 79 steps of 256 tokens" in said
    assert "39 steps" in said


@pytest.mark.parametrize(
    ("optim", "says"),
    [
        ({"warmup": "10K"}, "takes 40 steps"),  # rounding up alone is too long
        ({"warmup": 20_000}, "takes 79 steps"),
        ({"warmup": "9984"}, "cosine after it at least 1"),
        ({"warmup": 1.0}, "cosine after it at least 1"),
        ({"warmup": 1.0, "schedule": "wsd", "decay": 0.5}, "take 1.5 of the run"),
        ({"warmup": "9K", "schedule": "wsd"}, "wsd after it at least 8"),
        ({"warmup": "20K", "schedule": "constant"}, "takes 79 steps"),
        ({"warmup": "20K", "schedule": "wsd", "decay": 0}, "takes 79 steps"),
        ({"warmup": -0.1}, "must not be negative"),
        ({"warmup": 1.5}, "a fraction of the steps is at most 1"),
        ({"warmup": True}, "write a fraction"),
        ({"warmup": [0.1]}, "write a fraction"),
        ({"decay": 1.1}, "optim.decay = 1.1"),
        ({"final_lr": 1.5}, "optim.final_lr = 1.5"),
        ({"betas": [1.0, 1.0]}, "optim.betas.0 = 1.0"),
    ],
)
def test_schedules_without_room_are_refused_with_the_numbers(optim, says):
    assert says in refused(optim=optim)


@pytest.mark.parametrize(
    "optim",
    [
        {"warmup": 1.0, "schedule": "constant"},
        {"warmup": "9728"},
        {"warmup": 0.5, "schedule": "wsd", "decay": 0.5},
        {"warmup": 0.0, "schedule": "wsd", "decay": 1.0},
        {"warmup": "0", "schedule": "wsd", "decay": 1.0},
    ],
)
def test_the_longest_that_fit_are_taken(optim):
    config = validate(RunConfig, BASE | {"optim": optim}, "run.yaml")
    rates = [learning_rate(config.optim, 1.0, step, STEPS, batch_tokens=256) for step in range(STEPS)]
    assert max(rates) == pytest.approx(1.0 if optim["warmup"] not in {0.0, "0"} else 1 - 0.9 / STEPS)


def test_a_budget_by_parameters_is_checked_once_it_is_a_number():
    config = validate(RunConfig, BASE | {"tokens": "20x", "optim": {"warmup": "20K"}}, "run.yaml")
    assert config.steps(10_000) == 781
    with pytest.raises(ValueError, match="takes 79 steps"):
        config.steps(500)
    with pytest.raises(ValueError, match="20 tokens are less than one batch of 256"):
        config.steps(1)


@pytest.mark.parametrize(
    "alpha",
    [
        {"policy": "salt", "value": 0.5, "until": 0.0},  # would never teach
        {"policy": "salt", "value": 0.5, "until": 1.0},
        {"policy": "two_phase", "first": 0.5, "second": 0.0, "switch": 0.0},
        {"policy": "two_phase", "first": 0.0, "second": 0.5, "switch": 1.0},
        {"policy": "piecewise", "knots": [[0.5, 0.1], [0.5, 0.2]]},
        {"policy": "linear", "start": 0.1, "end": 1.1},
        {"policy": "cosine", "start": -0.1, "end": 0.5},
        {"policy": "prequential", "period": 5, "probe": 5},
        {"policy": "gap_driven", "floor": 0.95},
    ],
)
def test_alpha_schedules_with_an_empty_part_or_out_of_range_are_refused(alpha):
    assert "objective.alpha" in refused(objective={"alpha": alpha}, teacher={"kind": "unigram"})
