"""Warnings of loss spikes and slow ranks: when they come, and that each comes once."""

from __future__ import annotations

import random
import statistics

import pytest

from tutelage.train.run_log import LossBand, Stragglers


def spikes(losses):
    band = LossBand()
    return [step for step, loss in enumerate(losses, 1) if band.check(step, loss) is not None]


def noisy(count, level=3.0, noise=0.02, seed=0):
    draw = random.Random(seed)  # noqa: S311 - of a test
    return [draw.gauss(level, noise) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes(seed):
    draw = random.Random(seed)  # noqa: S311 - of a test
    falling = [2.0 + 4.0 / (1 + step / 10) + draw.gauss(0, 0.05) for step in range(400)]
    assert spikes(falling) == []
    assert spikes(noisy(1000, seed=seed)) == []
    assert spikes([2.5] * 100) == []


def test_a_spike_is_said_once_and_the_next_one_again():
    losses = noisy(40)
    losses[20:24] = [5.0, 6.0, 5.5, 4.5]
    losses[30] = 9.0
    assert spikes(losses) == [21, 31]
    band = LossBand()
    for step, loss in enumerate(losses[:20], 1):
        assert band.check(step, loss) is None
    text = band.check(21, 5.0)
    median = f"{statistics.median(losses[:20]):.3f}"
    assert text.startswith(
        f"step 21: cross-entropy 5.000 is a spike: the median of the last 20 logged is {median}, "
    )


def test_a_few_losses_are_not_enough_to_know_what_is_usual():
    assert spikes([3.0] * 7 + [30.0]) == []
    assert spikes([3.0] * 8 + [30.0]) == [9]


def test_a_rise_of_less_than_a_twentieth_is_no_spike_however_steady_the_loss():
    assert spikes([3.0] * 10 + [3.1]) == []
    assert spikes([3.0] * 10 + [3.2]) == [11]


def test_a_spike_is_six_standard_deviations_by_the_median_absolute_deviation():
    """Losses of 2.5 and 3.5 in turn: median 3, deviation .5, so 3 + 6 x 1.4826 x .5 = 7.448 is usual."""
    assert spikes([2.5, 3.5] * 4 + [7.44]) == []
    assert spikes([2.5, 3.5] * 4 + [7.46]) == [9]


def warned(rows, step_seconds=1.0):
    check = Stragglers()
    return [step for step, row in enumerate(rows, 1) if check.check(step, row, step_seconds) is not None]


def test_a_rank_that_stays_slow_is_named_once():
    slow, even = [0.1, 0.1, 0.25, 0.11], [0.1, 0.1, 0.1, 0.1]
    assert warned([slow] * 20) == [5]
    assert warned([slow] * 5 + [even] + [slow] * 5) == [5, 11]
    assert warned([slow] * 4 + [even] + [slow] * 4) == []
    check = Stragglers()
    texts = [check.check(step, slow, 1.0) for step in range(1, 6)]
    assert "rank 2 takes 250.0 ms, the others 100.0 ms" in texts[-1]


def test_two_ranks_are_compared_with_each_other_and_one_with_nothing():
    assert warned([[0.1, 0.2]] * 6) == [5]
    assert warned([[0.2, 0.1]] * 6) == [5]
    assert warned([[0.2]] * 6) == []


def test_what_costs_no_time_is_no_straggler():
    assert warned([[0.001, 0.003, 0.001]] * 9) == []
    assert warned([[0.001, 0.003, 0.001]] * 9, step_seconds=0.05) == [5]
