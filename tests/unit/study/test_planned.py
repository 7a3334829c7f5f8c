from __future__ import annotations

import pytest
from tiny_study import tiny_study

from tutelage.analysis.claims.registry import missing_for
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.study.expand import expand
from tutelage.study.nodes import Stores, bind, check_cells
from tutelage.study.plan import draft_of, plan_of
from tutelage.study.presets import load_study, preset_names

IDS = {"run", "baseline", "after", "evaluation"}


def test_a_draft_is_the_plan_but_for_run_ids(store, other_store, tmp_path):
    study = tiny_study()
    stores = Stores(store, {"scripture": other_store}, {}, {})
    nodes = bind(expand(study), stores, tmp_path / "runs", open_store(store).vocab_size)
    draft, plan = draft_of(expand(study)), plan_of(expand(study), nodes)
    assert [run.run for run in plan.runs] == [node.id for node in nodes]
    assert [run.run for run in draft.runs] == [node.cell.name for node in nodes]
    for drafted, planned in zip(draft.runs, plan.runs, strict=True):
        assert drafted.model_dump(exclude=IDS) == planned.model_dump(exclude=IDS)
        assert (drafted.baseline is None) == (planned.baseline is None)
    assert draft.students == plan.students


def test_announced_claims_that_no_run_can_decide_are_known_before_anything_is_built():
    mini, demo = draft_of(expand(load_study("mini"))), draft_of(expand(load_study("demo")))
    assert mini.claims == (*range(1, 17), *range(18, 25))
    assert [claim for claim in mini.claims if missing_for(mini, claim)] == []
    assert "post_training" in str(missing_for(demo, 18))


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("paper/")])
def test_the_papers_presets_can_decide_what_they_announce(name):
    plan = draft_of(expand(load_study(name)))
    assert [claim for claim in plan.claims if missing_for(plan, claim)] == []


def test_a_plan_says_what_a_teacher_reads_and_keeps():
    corpus = {"name": "scripture", "sources": [{"kind": "corpus", "name": "kjv"}]}
    cache = {"format": {"kind": "topk", "k": 5}}
    weak = {"shape": "nano-20k", "tokens": "4K", "corpus": corpus, "cache": cache}
    (teacher,) = draft_of(expand(tiny_study(teachers={"weak": weak}))).teachers
    assert (teacher.corpus, teacher.targets) == ("scripture", "topk")
    assert teacher.texts == ("scripture",)  # the domain of that name has the same source


def test_an_alpha_fixed_for_the_claims_is_in_the_plan():
    weak = {"shape": "nano-20k", "tokens": "4K", "tested_alpha": 0.4}
    grid = {"zip": {"shape": ["nano-20k", "nano-50k"], "tested_alpha": [0.4, None]}}
    by_grid = {"{shape}": {"tokens": "4K", "grid": grid}}
    students = {
        "main": {
            "shape": "nano-50k",
            "tokens": "4K",
            "grid": {"product": {"teacher": ["nano-*"], "alpha": [0.2, 0.4]}},
        }
    }

    assert draft_of(expand(tiny_study(teachers={"weak": weak}))).teachers[0].tested_alpha == 0.4
    plan = draft_of(expand(tiny_study(teachers=by_grid, students=students)))
    assert [teacher.tested_alpha for teacher in plan.teachers] == [0.4, None]


def test_an_alpha_fixed_for_the_claims_must_be_taught_with():
    weak = {"shape": "nano-20k", "tokens": "4K", "tested_alpha": 0.3}
    check_cells(expand(tiny_study(teachers={"weak": weak | {"tested_alpha": 0.4}})))
    with pytest.raises(UserError) as caught:
        check_cells(expand(tiny_study(teachers={"weak": weak})))
    assert str(caught.value) == (
        "study tiny: teacher weak: tested_alpha 0.3 is no constant alpha of its students; they have: 0.4"
    )
