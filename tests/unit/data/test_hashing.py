"""Counter-based numbers: known values, uniformity, independence of how they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.data.hashing import splitmix64, uniforms


def test_splitmix64_is_the_published_generator():
    """The first outputs for seed 1234567, as in the reference implementation's test vector."""
    states = 1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(states).tolist() == expected


def test_a_number_depends_on_its_place_alone():
    places = np.arange(100, 200)
    whole = uniforms(3, 1, places, 4)
    np.testing.assert_array_equal(whole[40:41], uniforms(3, 1, places[40:41], 4))
    np.testing.assert_array_equal(whole[:, :2], uniforms(3, 1, places, 2))


@pytest.mark.parametrize("other", [(4, 1, 0), (3, 2, 0), (3, 1, 1)])
def test_seed_stream_and_place_all_matter(other):
    seed, stream, offset = other
    places = np.arange(1000)
    a, b = uniforms(3, 1, places, 1)[:, 0], uniforms(seed, stream, places + offset, 1)[:, 0]
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_uniform_between_zero_and_one():
    numbers = np.sort(uniforms(0, 0, np.arange(20_000), 2).reshape(-1))
    grid = (np.arange(numbers.size) + 0.5) / numbers.size
    assert numbers[0] > 0
    assert numbers[-1] < 1
    assert np.abs(numbers - grid).max() < 1.95 / numbers.size**0.5  # Kolmogorov-Smirnov, 0.1%


def test_adding_a_count_does_not_round():
    numbers = uniforms(7, 0, np.arange(1000), 1)
    np.testing.assert_array_equal((numbers + 4095) - 4095, numbers)
    assert (numbers + 4095).max() < 4096
