from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.config.load import validate
from tutelage.config.study_config import Grid
from tutelage.errors import UserError


def points(**grid):
    return validate(Grid, grid, "test").points()


def test_product_is_every_combination_and_zip_side_by_side():
    assert points(product={"a": [1, 2], "b": ["x"]}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert points(zip={"a": [1, 2], "b": ["x", "y"]}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_chain_appends_and_cross_multiplies():
    one, two = {"product": {"a": [1, 2]}}, {"zip": {"b": [3]}}
    assert points(chain=[one, two]) == [{"a": 1}, {"a": 2}, {"b": 3}]
    assert points(cross=[one, two]) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    assert points(cross=[one, {"chain": [two, two]}]) == points(cross=[one, two])


def test_exclude_drops_what_matches_every_axis_of_a_rule():
    grid = {"product": {"a": [1, 2, 3], "b": [1, 2]}, "exclude": [{"a": [1, 2], "b": 2}, {"a": 3}]}
    assert points(**grid) == [{"a": 1, "b": 1}, {"a": 2, "b": 1}]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "exactly one of product, zip, chain and cross, not 0"),
        ({"product": {"a": [1]}, "zip": {"a": [1]}}, "not 2 of them"),
        ({"zip": {"a": [1, 2], "b": [1]}}, "same number of values"),
        ({"product": {"a": [1]}, "exclude": [{"b": 1}]}, "no axis 'b'"),
    ],
)
def test_mistakes_are_named(grid, message):
    with pytest.raises(UserError, match=message):
        points(**grid)


@given(st.dictionaries(st.sampled_from("abcd"), st.sets(st.integers(0, 5), min_size=1), min_size=1))
def test_a_product_has_as_many_points_as_its_axes_say_and_none_twice(axes):
    found = points(product={axis: sorted(values) for axis, values in axes.items()})
    assert len(found) == math.prod(map(len, axes.values()))
    assert len({tuple(point.items()) for point in found}) == len(found)


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 9))
def test_excluding_a_value_leaves_the_others_in_order(values, gone):
    found = points(product={"a": values}, exclude=[{"a": gone}])
    assert [point["a"] for point in found] == [value for value in dict.fromkeys(values) if value != gone]
