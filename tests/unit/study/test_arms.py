"""Chains and means of teachers in study files: their cells, costs, records, and what is refused."""

from __future__ import annotations

import pytest
from tiny_study import run_tiny, tiny_study

from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.claims.registry import missing_of
from tutelage.analysis.tables import equal_compute
from tutelage.config.teacher_config import MeanTeacher
from tutelage.errors import UserError
from tutelage.models.flops import forward_flops, training_flops
from tutelage.models.shapes import find_shape
from tutelage.run_directory import RunDirectory
from tutelage.study.cost import by_purpose, works_of
from tutelage.study.expand import expand
from tutelage.study.plan import draft_of, load_plan
from tutelage.study.results import load_results

TEACHERS = {
    "weak": {"shape": "nano-20k", "tokens": "4K"},
    "strong": {"shape": "nano-150k", "tokens": "4K"},
    "unigram": {"control": "unigram"},
    "mean": {"mean": ["weak", "strong", "unigram"]},
}


def students(generations=3, **settings):
    grid = {
        "chain": [
            {"product": {"teacher": ["mean"], "alpha": [0.4]}},
            {"product": {"teacher": ["previous"], "alpha": [0.4]}},
        ]
    }
    return {
        "main": {"shape": "nano-50k", "tokens": "4K", "grid": grid, "generations": generations} | settings
    }


def arms(**changes):
    return tiny_study(**{"teachers": TEACHERS, "students": students()} | changes)


def test_an_axis_by_its_dotted_path_is_the_arm_that_its_short_name_is():
    def arms_of(**axes):
        grid = {"product": {"teacher": ["weak"], **axes}}
        group = {"shape": "nano-50k", "tokens": "4K", "grid": grid}
        expanded = expand(arms(teachers={"weak": TEACHERS["weak"]}, students={"main": group}, claims=[9]))
        assert 9 not in missing_of(draft_of(expanded))
        return [(cell.name, cell.arm_settings) for cell in expanded.cells if cell.kind == "student"]

    dotted = arms_of(**{"objective.alpha": [1.0], "objective.temperature": [0.5, 2.0]})
    assert dotted == arms_of(alpha=[1.0], temperature=[0.5, 2.0])


@pytest.mark.parametrize("seeds", [{}, {"seeds": [43, 44], "teacher_seeds": [1043, 1044]}])
def test_each_generation_needs_the_one_before_and_a_mean_all_its_teachers(seeds):
    cells = expand(arms(**seeds)).cells
    by_name = {cell.name: cell for cell in cells}
    for seed in seeds.get("seeds", [43]):
        chain = [cell for cell in cells if cell.teacher == "previous" and cell.seed == seed]
        assert [cell.arm for cell in chain] == [f"alpha 0.4, generation {k}" for k in (1, 2, 3)]
        before = [f"student-nano-50k-4K-s{seed}", *(cell.name for cell in chain)]
        assert [cell.needs for cell in chain] == [(name,) for name in before[:3]]
        assert [cell.learned for cell in chain] == before[:3]
        assert {cell.baseline for cell in chain} == {before[0]}
        (mean,) = [cell for cell in cells if cell.teacher == "mean" and cell.seed == seed]
        own = f"-s{1000 + seed}" if seeds else ""
        assert mean.needs == (f"teacher-weak{own}", f"teacher-strong{own}")
        assert all(need in by_name for cell in chain for need in cell.needs)
    assert not any(cell.teacher == "mean" for cell in cells if cell.kind == "teacher")


def test_costs_are_those_of_every_teacher_that_runs():
    study = arms()
    own, weak, strong = (
        forward_flops(find_shape(f"nano-{size}"), 300, 32) for size in ("50k", "20k", "150k")
    )
    tokens = 4000 // 256 * 256
    expected = {"mean": weak + strong, "previous": own, None: 0.0}
    for run in draft_of(expand(study)).runs:
        if run.kind != "teacher":
            assert run.flops == pytest.approx((training_flops(own) + expected[run.teacher]) * tokens)
    works, caches, _ = works_of([expand(study)])
    forward = (weak + strong + 3 * own) * tokens
    assert by_purpose(works, caches)["teacher forward"] == pytest.approx(forward)
    late = {"policy": "two_phase", "first": 0.0, "second": 1.0, "switch": 0.7}  # the last 5 of 15 steps
    grid = {"product": {"teacher": ["weak"], "alpha": [late]}}
    works, caches, _ = works_of([expand(arms(students=students(None, grid=grid)))])
    assert by_purpose(works, caches)["teacher forward"] == pytest.approx(weak * tokens * 5 / 15)
    kept = TEACHERS | {"mean": TEACHERS["mean"] | {"cache": {"format": {"kind": "topk", "k": 8}}}}
    works, caches, _ = works_of([expand(arms(teachers=kept))])
    assert caches.flops == pytest.approx((weak + strong) * tokens)
    assert [work.beside for work in works if work.cell.teacher == "mean"] == ["cached"]


def test_a_mean_is_of_the_teachers_whose_runs_there_are():
    """One that differs from another in its targets alone has no run of its own to be looked for."""
    more = {"kept": TEACHERS["weak"] | {"cache": {}}, "mean": {"mean": ["kept", "strong", "unigram"]}}
    plan = draft_of(expand(arms(teachers=TEACHERS | more)))
    (mean,) = (teacher for teacher in plan.teachers if teacher.name == "mean")
    trained = {run.teacher for run in plan.runs if run.kind == "teacher"}
    assert mean.of == ("weak", "strong", "unigram")
    assert trained == {"weak", "strong"}
    assert mean.description == "mean of kept, strong, unigram"


def test_a_mean_is_of_points_of_a_grid_under_their_names():
    grid = {"product": {"shape": ["nano-20k"], "tokens": ["2K", "3K"]}}
    more = {"{shape}@{tokens}": {"grid": grid}, "mean": {"mean": ["nano-20k@*"]}}
    plan = draft_of(expand(arms(teachers=TEACHERS | more)))
    assert {teacher.name: teacher.of for teacher in plan.teachers}["mean"] == ("nano-20k@2K", "nano-20k@3K")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": TEACHERS | {"previous": TEACHERS["weak"]}}, "teachers.previous: that stands for"),
        ({"teachers": TEACHERS | {"more": {"mean": ["*"]}}}, "more.mean: mean is a mean itself"),
        (
            {"teachers": TEACHERS | {"mean": {"mean": ["weak"]}}},
            "weak alone; a mean is of two teachers or more",
        ),
        (
            {"teachers": TEACHERS | {"mean": {"mean": ["weka", "strong"]}}},
            "'weka' is unknown; did you mean 'weak'",
        ),
        (
            {
                "teachers": TEACHERS
                | {"mean": {"mean": ["weak", "kept"]}, "kept": TEACHERS["weak"] | {"cache": {}}}
            },
            "weak, kept are the same run",
        ),
        (
            {"teachers": TEACHERS | {"mean": TEACHERS["mean"] | {"cache": {"format": {"kind": "hidden"}}}}},
            "a mean of teachers has no hidden states",
        ),
        (
            {"teachers": TEACHERS | {"mean": TEACHERS["mean"] | {"shape": "nano-20k"}}},
            "or 'control', or 'mean'",
        ),
        ({"students": students(None)}, "give 'generations'"),
        (
            {"students": students(3, grid={"product": {"teacher": ["weak"], "alpha": [0.4]}})},
            "generations = 3, but no point has the teacher previous",
        ),
        (
            {"students": students(3, grid={"product": {"teacher": ["prevoius"], "alpha": [1]}})},
            "mean 'previous'",
        ),
        ({"students": students(3, grid={"product": {"teacher": ["previous"]}})}, "previous without alpha"),
        ({"students": students(0)}, "generations = 0"),
    ],
)
def test_what_cannot_be_is_named_from_the_file_alone(changes, message):
    with pytest.raises(UserError) as caught:
        expand(arms(**changes))
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_study_with_a_chain_and_a_mean_is_run_and_judged(tmp_path):
    study = arms(students=students(2), seeds=[43, 44], teacher_seeds=[1043, 1044])
    run_tiny(study, tmp_path)
    plan = load_plan(tmp_path)
    runs = {run.run: run for run in plan.runs}
    spent = {}
    for run in runs.values():
        state = RunDirectory(tmp_path / "runs" / run.run).state()
        assert state["status"] == "done"
        spent[run.run] = state["train_flops"] + state.get("teacher_flops", 0.0)
        assert spent[run.run] == pytest.approx(run.flops, rel=1e-6)
    for run in runs.values():
        config = RunDirectory(tmp_path / "runs" / run.run).config()
        if run.teacher == "previous":
            before = runs[config.teacher.run]
            number = run.arm_settings["generation"]
            assert (before.seed, run.teacher_run) == (run.seed, before.run)
            assert (before.arm_settings or {}).get("generation", 0) == number - 1
        if run.teacher == "mean":
            assert isinstance(config.teacher, MeanTeacher)
            taught_by = [runs[part.run].teacher for part in config.teacher.of if part.kind == "run"]
            assert taught_by == ["weak", "strong"]
            assert {runs[part.run].seed for part in config.teacher.of if part.kind == "run"} == {
                1000 + run.seed
            }
    judged = judge_study(load_results(tmp_path))
    (base,) = {spent[run.run] for run in runs.values() if run.kind == "baseline"}
    rows = {one.pair.teacher.name: one for one in equal_compute(judged)}
    chain = rows["previous"]
    number = chain.best.arm_settings["generation"]
    first = next(spent[r.run] for r in runs.values() if (r.arm_settings or {}).get("generation") == 1)
    assert chain.teacher_training == pytest.approx((base + first * (number - 1)) / base)
    assert chain.pair.relation is not None
    assert chain.pair.flat == ()  # its arms have one alpha, and are no choice of it
    assert {one.best.n_teachers for one in rows.values()} == {2}  # both are trained anew for each seed
    trained = [spent[run.run] for run in runs.values() if run.kind == "teacher" and run.seed == 1043]
    assert rows["mean"].teacher_training == pytest.approx(sum(trained) / base)
