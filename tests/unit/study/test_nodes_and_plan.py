"""Runs of a study with their ids, and what its plan says of them."""

from __future__ import annotations

import inspect

import pytest
from tiny_study import tiny_study

from tutelage.analysis.claims.registry import missing_of
from tutelage.cli import main
from tutelage.config.base import parse_tokens
from tutelage.config.load import validate
from tutelage.config.study_config import StudyConfig
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.study.cost import works_of
from tutelage.study.expand import expand
from tutelage.study.nodes import Stores, bind, check_cells
from tutelage.study.plan import draft_of, plan_of
from tutelage.study.presets import demo_study, load_study, preset_names

IDS = {"run", "baseline", "after", "evaluation"}


@pytest.fixture
def nodes(store, other_store, tmp_path):
    study = demo_study(seeds=2, tokens="20K", quick=False)
    stores = Stores(store, dict.fromkeys(study.domains, other_store), {}, {})
    return bind(expand(study), stores, tmp_path / "runs", open_store(store).vocab_size)


def test_every_cell_is_there_once(nodes):
    cells = [(node.cell.kind, node.cell.teacher, node.cell.alpha, node.cell.seed) for node in nodes]
    assert len(set(cells)) == len(cells) == 2 * (3 + 1 + 3 * 2 + 1)
    assert len({node.id for node in nodes}) == len(nodes)


def test_students_of_one_seed_differ_only_in_teacher_and_alpha(nodes):
    students = [node.config for node in nodes if node.cell.kind != "teacher" and node.cell.seed == 43]
    same = [s.model_dump(exclude={"name", "teacher", "objective"}) for s in students]
    assert all(one == same[0] for one in same)
    assert {s.data.seed for s in students} == {43} == {s.seed for s in students}


def test_a_student_waits_for_exactly_its_teacher(nodes):
    trained = {(n.cell.teacher, n.cell.seed - 1000): n.id for n in nodes if n.cell.kind == "teacher"}
    assert set(trained) == {(name, seed) for name in ("weak", "same-level", "strong") for seed in (43, 44)}
    for node in nodes:
        if node.cell.kind == "student" and node.cell.teacher != "unigram":
            own = trained[node.cell.teacher, node.cell.seed]
            assert node.needs == (own,)
            assert node.config.teacher.run == own
        else:
            assert node.needs == ()


def test_ids_change_with_what_changes_the_result_and_with_nothing_else(store, other_store, tmp_path):
    stores = Stores(store, dict.fromkeys(demo_study(1, None, quick=False).domains, other_store), {}, {})

    def ids(output, tokens="20K", **run):
        study = demo_study(1, tokens, quick=False)
        study = validate(StudyConfig, study.model_dump(mode="json") | {"run": study.run | run}, "test")
        return {node.id for node in bind(expand(study), stores, output, 300)}

    first = ids(tmp_path / "a")
    assert first == ids(tmp_path / "b", runtime={"device": "cpu", "threads": 2}, eval={"max_documents": 3})
    assert not first & ids(tmp_path / "a", tokens="21K")
    assert not first & ids(tmp_path / "a", global_batch_tokens=512)


def test_estimate_counts_the_teacher_forward(nodes):
    cost = {
        (node.cell.kind, node.cell.teacher): node.cost.total for node in nodes if node.cell.seed in {1043, 43}
    }
    assert cost["student", "unigram"] == cost["baseline", None]
    extra = cost["student", "same-level"] / cost["baseline", None]
    assert extra == pytest.approx(4 / 3)  # arXiv 2605.23857: 1.33 for a teacher of the student's size


def test_the_demo_has_three_seeds_each_with_teachers_of_its_own():
    demo = load_study("demo")

    assert demo == demo_study(3, None, quick=False)
    assert (len(demo.seeds), len(demo.teacher_seeds)) == (3, 3)
    assert inspect.signature(main.demo).parameters["seeds"].default == 3


def test_quick_and_tokens_exclude_each_other_and_budgets_are_checked():
    assert parse_tokens(demo_study(1, None, quick=True).students["student"].tokens) < 200_000
    with pytest.raises(UserError, match="give one"):
        demo_study(1, "1M", quick=True)
    with pytest.raises(UserError, match="not a token budget"):
        demo_study(1, "lots", quick=False)


def test_a_wrong_setting_of_all_runs_is_named(store, other_store, tmp_path):
    study = demo_study(1, None, quick=False)
    study = validate(StudyConfig, study.model_dump(mode="json") | {"run": {"optim": {"lrr": 1}}}, "test")
    stores = Stores(store, dict.fromkeys(study.domains, other_store), {}, {})
    with pytest.raises(UserError, match="did you mean 'lr'"):
        bind(expand(study), stores, tmp_path, 300)


def test_runs_may_be_scored_on_the_way_which_both_estimates_count(store, other_store, tmp_path):
    def scored(**changes):
        run = tiny_study().run
        expanded = expand(tiny_study(run=run | {"eval": run["eval"] | changes}))
        stores = Stores(store, {"scripture": other_store}, {}, {})
        works, _, _ = works_of([expanded])
        return [one.scoring_flops for one in (*bind(expanded, stores, tmp_path, 300), *works)]

    # of 15 steps every third, and at the end
    assert scored(every="1K") == pytest.approx([5 * flops for flops in scored()])


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
    assert [claim for claim in mini.claims if claim in missing_of(mini)] == []
    assert "post_training" in missing_of(demo)[18]


def test_the_replication_leaves_nothing_open_before_its_first_run():
    study = load_study("replication")
    plan = draft_of(expand(study))
    assert plan.claims == (*range(1, 17), *range(18, 25))
    assert [claim for claim in plan.claims if claim in missing_of(plan)] == []
    old = load_study("mini")
    assert not {*study.seeds, *study.teacher_seeds} & {*old.seeds, old.teacher_seed}
    constants = {}
    for run in plan.runs:
        if run.kind == "student" and run.constant:
            constants.setdefault((run.student, run.teacher), set()).add(run.alpha)
    tested = {teacher.name: teacher.tested_alpha for teacher in plan.teachers}
    free = [pair for pair, own in constants.items() if len(own) > 1 and tested[pair[1]] not in own]
    assert free == []


def test_seeds_with_teachers_of_their_own_are_replicates_in_the_order_of_the_file(nodes):
    places = {(node.cell.kind, node.cell.seed): node.replicate for node in nodes}
    for kind, first in (("teacher", 1043), ("baseline", 43), ("student", 43)):
        assert [places[kind, first + i] for i in range(2)] == [0, 1]


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("paper/")])
def test_the_papers_presets_can_decide_what_they_announce(name):
    plan = draft_of(expand(load_study(name)))
    assert [claim for claim in plan.claims if claim in missing_of(plan)] == []


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
