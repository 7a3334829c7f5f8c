"""Rows of a table of scores are told apart by name, so two names must be two."""

from __future__ import annotations

import shutil

import pytest

from tutelage.errors import UserError
from tutelage.evals.evaluate import select
from tutelage.evals.evaluated_model import find_models


@pytest.mark.parametrize(
    ("domains", "stores", "message"),
    [
        ([], ["a=x", "a=y"], "--store a: given twice, for x and y"),
        ([], ["a_1=x", "a-1=y"], "'a_1' and 'a-1' are one name"),
        ([], ["Held=x", "held=y"], "'Held' and 'held' are one name"),
        (["kjv"], ["KJV=x"], "'kjv' and 'KJV' are one name"),
        (["kjv"], ["kjv=x"], "a domain of that name is scored already"),
        ([], ["../up=x"], "a name has letters"),
        ([], ["=x"], "write NAME=DIRECTORY"),
        ([], ["a="], "write NAME=DIRECTORY"),
    ],
)
def test_stores_and_domains_of_one_name_are_refused(domains, stores, message):
    with pytest.raises(UserError) as caught:
        select(domains, None, stores)
    assert message in str(caught.value)


def test_a_domain_named_twice_is_scored_once():
    assert list(select(["kjv", "kjv"], None, [])[0]) == ["kjv"]


def test_runs_of_one_name_in_two_places_are_refused_and_the_same_run_is_one(tiny_run, tmp_path):
    first = tiny_run.path
    assert len(find_models([str(first), f"{first}/"], tmp_path)) == 1
    second = shutil.copytree(first, tmp_path / "elsewhere" / first.name)
    with pytest.raises(UserError, match=f"both are called {first.name}"):
        find_models([str(first), str(second)], tmp_path)
