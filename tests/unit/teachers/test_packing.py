"""Bit packing: every width, every length, against a bit-by-bit definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.teachers.cache.packing import (
    LARGEST_WIDTH,
    Columns,
    pack,
    pack_rising,
    packed_bytes,
    unpack,
    width_of,
)


def bit_by_bit(values: np.ndarray, width: int) -> bytes:
    bits = [(int(value) >> place) & 1 for value in values for place in range(width)]
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()


@given(st.data(), st.integers(1, LARGEST_WIDTH), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_round_trip(data, width, count):
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count))
    values = np.array(numbers, np.int64)
    column = pack(values, width)
    assert column == bit_by_bit(values, width)
    assert len(column) == packed_bytes(count, width)
    np.testing.assert_array_equal(unpack(memoryview(column), count, width), values)


@pytest.mark.parametrize("width", range(1, LARGEST_WIDTH + 1))
def test_every_width_keeps_its_extremes_apart(width):
    values = np.tile([0, 2**width - 1, 1, 2 ** (width - 1)], 50)
    np.testing.assert_array_equal(unpack(memoryview(pack(values, width)), 200, width), values % 2**width)


@pytest.mark.parametrize(
    ("count", "width"),
    [
        (1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (300, 9), (49_152, 16), (50_257, 16),
        (65_536, 16), (65_537, 17), (128_256, 17), (151_936, 18), (262_144, 18), (262_145, 19), (2**24, 24),
    ],
)  # fmt: skip
def test_width_of_a_vocabulary(count, width):
    assert width_of(count) == width
    ids = np.array([0, count - 1, count // 2])
    np.testing.assert_array_equal(unpack(memoryview(pack(ids, width)), 3, width), ids)


def test_rows_are_read_in_order():
    values = np.arange(60).reshape(4, 15).T
    np.testing.assert_array_equal(unpack(memoryview(pack(values, 6)), 60, 6), values.reshape(-1))


@pytest.mark.parametrize("values", [[-1, 3], [0, 8]])
def test_a_number_that_does_not_fit_is_refused(values):
    with pytest.raises(ValueError, match="do not fit into 3 bits"):
        pack(np.array(values), 3)


def test_columns_are_taken_one_after_the_other():
    numbers = np.arange(9)
    columns = Columns(pack(numbers, 5) + pack(numbers, 12))
    np.testing.assert_array_equal(columns.take(9, 5), numbers)
    np.testing.assert_array_equal(columns.take(9, 12), numbers)
    columns.finish()


def test_a_blob_of_another_length_is_refused():
    blob = pack(np.arange(9), 5)
    with pytest.raises(ValueError, match="another length"):
        Columns(blob).take(15, 5)
    columns = Columns(blob + b"x")
    columns.take(9, 5)
    with pytest.raises(ValueError, match="1 bytes are left over"):
        columns.finish()


@given(st.lists(st.sets(st.integers(0, 4999), max_size=30), max_size=9), st.sampled_from([1, 5, 9, 12, 13]))
@settings(max_examples=100, deadline=None)
def test_rising_numbers(rows, low_bits):
    values = np.array([value for row in rows for value in sorted(row)], np.int64)
    counts = np.array([len(row) for row in rows], np.int64)
    groups = (4999 >> low_bits) + 1
    blob = pack_rising(values, counts, low_bits, groups)
    size = packed_bytes(values.size, low_bits) + packed_bytes(values.size + len(rows) * (groups - 1), 1)
    assert len(blob) == size
    columns = Columns(blob + pack(np.arange(3), 2))
    np.testing.assert_array_equal(columns.take_rising(counts, low_bits, groups), values)
    np.testing.assert_array_equal(columns.take(3, 2), np.arange(3))
    columns.finish()


def test_rising_numbers_that_cannot_be():
    values, counts = np.array([3, 40]), np.array([2])
    with pytest.raises(ValueError, match="40: above 4 groups of 8"):
        pack_rising(values, counts, 3, 4)
    blob = pack_rising(values, counts, 3, 6)
    with pytest.raises(ValueError, match="bits are set"):
        Columns(blob[:-1] + bytes([255])).take_rising(counts, 3, 6)
