"""Whatever is named becomes a directory, a row or a key somewhere: two names must stay two."""

from __future__ import annotations

import pytest
from tiny_study import TINY, tiny_study

from tutelage.config.base import refuse_alike, slug
from tutelage.config.load import load, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.errors import UserError
from tutelage.study.cells import teachers_of
from tutelage.study.cost import works_of
from tutelage.study.expand import expand
from tutelage.study.nodes import check_cells

KJV = {"source": {"kind": "corpus", "name": "kjv"}}
WEAK = {"shape": "nano-20k", "tokens": "4K"}
PAIRS = {"corpus": TINY["corpus"], "tokens": "4K"}


def students(**product):
    grid = {"product": {"teacher": ["weak"], "alpha": [0.4]} | product}
    return {"main": {"shape": "nano-50k", "tokens": "4K", "grid": grid}}


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"teachers": {"weak_1": WEAK, "weak-1": WEAK | {"seed": 1}}}, "weak_1", "weak-1"),
        ({"teachers": {"weak": WEAK, "Weak": WEAK | {"seed": 1}}}, "weak", "Weak"),
        ({"teachers": {"weak@1": WEAK, "weak": WEAK, "weak_1": {"control": "unigram"}}}, "weak@1", "weak_1"),
        (
            {
                "teachers": {
                    "weak": WEAK,
                    "t-{seed}": WEAK | {"grid": {"product": {"seed": [1]}}},
                    "t_1": WEAK,
                }
            },
            "t-1",
            "t_1",
        ),
        ({"domains": {"drama_a": KJV, "drama-a": KJV}}, "drama_a", "drama-a"),
        ({"domains": {"drama": KJV, "DRAMA": KJV}}, "drama", "DRAMA"),
        ({"domains": {"In-Domain": KJV}}, "in-domain", "In-Domain"),
        ({"students": {"a_b": students()["main"], "a-b": students()["main"]}}, "a_b", "a-b"),
        ({"post_training": {"sft_1": PAIRS, "sft-1": PAIRS}}, "sft_1", "sft-1"),
    ],
)
def test_names_that_become_one_are_refused_naming_both(changes, first, second):
    with pytest.raises(UserError) as caught:
        check_cells(expand(tiny_study(**changes)))
    assert f"'{first}' and '{second}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [43, 43]}, "seeds: 43 is listed twice"),
        ({"claims": [1, 2, 1]}, "claims: 1 is listed twice"),
        (
            {"students": {"main": students()["main"] | {"seeds": [1, 1]}}},
            "students.main.seeds: 1 is listed twice",
        ),
        (
            {"students": {"main": students()["main"] | {"then": ["s", "s"]}}, "post_training": {"s": PAIRS}},
            "listed twice",
        ),
        (
            {"students": students(**{"lr": [0.1], "optim.lr": [0.2]})},
            "axes 'lr' and 'optim.lr' are the same setting",
        ),
        (
            {"students": {"main": students(seed=[1])["main"] | {"seeds": [2]}}},
            "seeds are given and are an axis too",
        ),
        (
            {"students": students(alphas=[0.4])},
            "axis 'alphas' is unknown; did you mean 'alpha'? known: compute",
        ),
        ({"run": {"seed": 5}}, "run.seed: the study sets that"),
        ({"run": {"data": {"store": "x"}}}, "run.data.store: the study sets that"),
        ({"run": {"tokens": "1K"}}, "run.tokens"),
        ({"run": {"eval": {"domains": []}}}, "run.eval.domains"),
        ({"students": students(**{"model.shape": ["nano-20k"]})}, "run.model"),
        (
            {"students": students(alpha=[0.4, {"policy": "constant", "value": 0.4}])},
            "same run in different words",
        ),
        ({"run": {"data": 5}}, "run.data = 5: a section"),
        ({"run": {"optim": {"lr": {}}}}, "optim.lr"),
    ],
)
def test_what_is_said_twice_or_in_two_ways_is_refused(changes, says):
    with pytest.raises(UserError) as caught:
        check_cells(expand(tiny_study(**changes)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_given_twice_in_a_file_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {shape: nano-50k}\ntokens: 1K\ntokens: 2K\ndata: {store: s}\n")
    with pytest.raises(UserError, match=r"run\.yaml: line 3: tokens is given twice"):
        load(RunConfig, path)


def test_two_eval_domains_of_one_name_are_refused():
    base = {"model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "1M"}
    for names in (("a", "a"), ("a", "A"), ("a.b_c", "a.b-c")):
        domains = [{"name": name, "store": name} for name in names]
        with pytest.raises(UserError, match="domains: "):
            validate(RunConfig, base | {"eval": {"domains": domains}}, "run.yaml")


def test_a_value_listed_twice_is_one_point():
    once, twice = (tiny_study(students=students(alpha=alphas)) for alphas in ([0.4], [0.4, 0.4]))
    assert expand(once).cells == expand(twice).cells


def test_names_that_only_look_alike_stay_two():
    refuse_alike("x", ["a.b", "a-b", "ab", "a", "b", 1, 10, 0.1])
    assert slug("a.b_c@d") == "a.b-c-d"
    study = tiny_study(teachers={"weak": WEAK, "weak.1": WEAK | {"seed": 1}, "weak-2": WEAK | {"seed": 2}})
    assert [cell.name for cell in expand(study).cells if cell.kind == "teacher"] == [
        "teacher-weak",
        "teacher-weak.1",
        "teacher-weak-2",
    ]


SPELLINGS = ["40K", 40_000, "40000", "40_000", "4e4", 4e4, "0.04M", "40.0K"]


def test_a_budget_has_one_spelling_in_a_study():
    first = None
    for tokens in SPELLINGS:
        study = tiny_study(
            teachers={"weak": WEAK | {"tokens": tokens}},
            students={"main": students()["main"] | {"tokens": tokens}},
        )
        found = [(cell.name, cell.student, cell.tokens, cell.settings) for cell in expand(study).cells]
        first = first or found
        assert found == first
        axis = students(tokens=[tokens])["main"] | {"tokens": None}
        again = tiny_study(teachers={"weak": WEAK | {"tokens": tokens}}, students={"main": axis})
        assert [
            (cell.name, cell.student, cell.tokens, cell.settings) for cell in expand(again).cells
        ] == first
        assert [work.key for work in works_of([expand(study)])[0]] == [
            work.key for work in works_of([expand(again)])[0]
        ]
    every = students(tokens=SPELLINGS[:1] + SPELLINGS[2:4])["main"] | {"tokens": None}
    both = tiny_study(teachers={"weak": WEAK | {"tokens": "40K"}}, students={"main": every})
    assert len(expand(both).cells) == len(first)


def test_a_grid_of_teachers_has_one_name_per_budget():
    grid = {"product": {"tokens": [4000, "8_000"], "shape": ["nano-20k"]}}
    study = tiny_study(teachers={"{shape}@{tokens}": {"grid": grid}, "weak": WEAK})
    assert list(teachers_of(study)) == ["nano-20k@4K", "nano-20k@8K", "weak"]


def test_a_study_file_and_its_dump_are_one_study():
    study = tiny_study()
    assert validate(StudyConfig, study.model_dump(mode="json"), "again") == study


def test_budgets_in_a_plan_are_what_is_trained():
    study = tiny_study(
        teachers={"weak": WEAK | {"tokens": 2000}}, students={"main": students()["main"] | {"tokens": "3.9K"}}
    )
    works, _, notes = works_of([expand(study)])
    assert {work.cell.kind: work.cost.tokens for work in works} == {
        "teacher": 1792,
        "baseline": 3840,
        "student": 3840,
    }
    assert "tiny: of 2K tokens 1,792 are trained, in whole batches of 256" in notes
    assert "tiny: of 3.9K tokens 3,840 are trained, in whole batches of 256" in notes
    with pytest.raises(UserError, match="200 tokens are less than one batch of 256"):
        works_of([expand(tiny_study(teachers={"weak": WEAK | {"tokens": 200}}))])
