from __future__ import annotations

import pytest
from study_files import group, study

from tutelage.errors import UserError
from tutelage.study.cells import teachers_of
from tutelage.study.expand import expand


def test_a_grid_of_teachers_is_named_by_its_axes():
    found = teachers_of(study())
    assert list(found) == ["nano-20k@1M", "nano-20k@2M", "nano-50k@1M", "nano-50k@2M", "unigram"]
    assert (found["nano-50k@2M"].shape, found["nano-50k@2M"].tokens) == ("nano-50k", 2_000_000)
    assert {cell.seed for cell in expand(study()).cells} == {42}


def test_teachers_that_differ_in_targets_alone_are_trained_once():
    cache = {"format": {"kind": "topk", "k": 5}}
    both = {"shape": "nano-20k", "tokens": "1M"}
    teachers = {"live": both, "kept": both | {"cache": cache}, "other": both | {"seed": 1}}
    grid = {"product": {"teacher": ["live", "kept", "other"], "alpha": [0.4]}}
    cells = expand(study(teachers=teachers, students=group(grid))).cells
    assert [cell.teacher for cell in cells if cell.kind == "teacher"] == ["live", "other"]
    needs = {cell.teacher: cell.needs for cell in cells if cell.kind == "student"}
    assert needs == {"live": ("teacher-live",), "kept": ("teacher-live",), "other": ("teacher-other",)}


def test_a_pattern_stands_for_every_teacher_that_matches():
    cells = expand(study(students=group({"product": {"teacher": ["nano-*@1M"], "alpha": [0.4]}}))).cells
    assert {cell.teacher for cell in cells if cell.kind == "student"} == {"nano-20k@1M", "nano-50k@1M"}


def test_students_that_share_everything_but_the_teacher_share_a_baseline():
    grid = {"product": {"teacher": ["nano-20k@1M"], "alpha": [0.2, 0.4], "temperature": [1.0, 2.0]}}
    cells = {cell.name: cell for cell in expand(study(students=group(grid))).cells}
    students = [cell for cell in cells.values() if cell.kind == "student"]
    assert len(students) == 2 * 2 * 2
    for cell in students:
        baseline = cells[cell.baseline]
        assert baseline.kind == "baseline"
        assert baseline.seed == cell.seed
        assert baseline.settings == {k: v for k, v in cell.settings.items() if k != "objective"}
        assert cell.needs == ("teacher-nano-20k-1M",)
    assert {cell.arm for cell in students} >= {"alpha 0.2, temperature 1", "alpha 0.4, temperature 2"}


def test_what_is_not_about_the_teacher_makes_another_student_with_its_own_baseline():
    grid = {"product": {"teacher": ["unigram"], "alpha": [0.1], "lr": [1e-3, 2e-3], "shape": ["nano-20k"]}}
    cells = expand(study(students=group(grid))).cells
    assert len({cell.student for cell in cells if cell.kind == "student"}) == 2
    assert sum(cell.kind == "baseline" for cell in cells) == 2 * 2
    assert {cell.settings["optim"]["lr"] for cell in cells if cell.kind == "baseline"} == {1e-3, 2e-3}


def test_a_cell_that_two_groups_ask_for_is_one_run():
    grid = {"product": {"teacher": ["unigram"], "alpha": [0.1]}}
    twice = group(grid) | {"again": group(grid)["main"]}
    assert len(expand(study(students=twice)).cells) == len(expand(study(students=group(grid))).cells)


def test_a_policy_is_an_alpha_and_no_number():
    grid = {"product": {"teacher": ["unigram"], "alpha": [{"policy": "salt", "value": 0.8, "until": 0.3}]}}
    (cell,) = (c for c in expand(study(students=group(grid), seeds=[43])).cells if c.kind == "student")
    assert cell.alpha is None
    assert cell.arm == "salt value 0.8 until 0.3"
    assert cell.settings["objective"]["alpha"]["policy"] == "salt"


def test_objective_settings_of_a_group_reach_its_students_and_not_their_baseline():
    run = {"objective": {"divergence": "reverse_kl"}}
    cells = expand(
        study(students=group({"product": {"teacher": ["unigram"], "alpha": [0.1]}}, run=run))
    ).cells
    for cell in cells:
        expected = {"divergence": "reverse_kl", "alpha": 0.1} if cell.kind == "student" else None
        assert cell.settings.get("objective") == expected or cell.kind == "teacher"


def test_what_the_objective_says_of_labels_is_the_baselines_too():
    """Else a gain would be that of label smoothing, and a teacher be told how it is to be taught."""
    smooth = {"label_smoothing": 0.1, "z_loss": 0.001}
    grid = {"product": {"teacher": ["nano-20k@1M"], "alpha": [0.4]}}
    run = {"objective": smooth | {"mixing": "keep_full_kd"}}
    stages = {"sft": {"corpus": {"name": "p", "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}]},
                      "tokens": "10K"}}  # fmt: skip
    whole = study(students=group(grid, then=["sft"]), seeds=[43], run=run, post_training=stages)
    objectives = {cell.kind: cell.settings["objective"] for cell in expand(whole).cells}
    taught = objectives.pop("student")
    assert taught == run["objective"] | {"alpha": 0.4}
    assert objectives == dict.fromkeys(("teacher", "baseline", "after"), smooth)

    groups = {"plain": group(grid)["main"], "smooth": group(grid, run={"objective": smooth})["main"]}
    cells = expand(study(students=groups, seeds=[43])).cells
    baseline = {cell.name: cell.settings.get("objective") for cell in cells if cell.kind == "baseline"}
    found = [
        (cell.settings["objective"], baseline[cell.baseline]) for cell in cells if cell.kind == "student"
    ]
    assert found == [({"alpha": 0.4}, None), (smooth | {"alpha": 0.4}, smooth)]


def test_seeds_can_be_an_axis():
    grid = {"zip": {"teacher": ["nano-20k@1M", "nano-50k@1M"], "seed": [7, 8]}}
    cells = expand(study(students=group({"cross": [grid, {"product": {"alpha": [0.4]}}]}))).cells
    found = {(cell.teacher, cell.seed) for cell in cells if cell.kind == "student"}
    assert found == {("nano-20k@1M", 7), ("nano-50k@1M", 8)}


def test_an_axis_can_be_any_setting_of_a_run_by_its_path():
    grid = {
        "product": {
            "teacher": ["unigram"],
            "alpha": [0.1],
            "optim.weight_decay": [0.0, 0.1],
            "objective.skew": [0.2],
            "objective.divergence": ["skew_kl"],
        }
    }
    cells = expand(study(students=group(grid), seeds=[43], run={"optim": {"clip": 0.5}})).cells
    students = [cell for cell in cells if cell.kind == "student"]
    assert [cell.settings["optim"] for cell in students] == [
        {"clip": 0.5, "weight_decay": 0.0},
        {"clip": 0.5, "weight_decay": 0.1},
    ]
    assert {cell.arm for cell in students} == {"alpha 0.1, divergence skew_kl, objective.skew 0.2"}
    # what is not about the teacher is the baseline's too; what is about it, is not
    baselines = {cell.name: cell for cell in cells if cell.kind == "baseline"}
    assert [baselines[cell.baseline].settings["optim"] for cell in students] == [
        cell.settings["optim"] for cell in students
    ]
    assert all("objective" not in cell.settings for cell in baselines.values())


def test_a_group_and_a_teacher_can_override_any_setting():
    own = {"tokens": "1M", "run": {"optim": {"clip": 2.0}, "data": {"seed": 7}}}
    teachers = {"{shape}": own | {"grid": {"product": {"shape": ["nano-20k"], "optim.lr": [0.1]}}}}
    run = {"optim": {"weight_decay": 0.0}, "objective": {"divergence": "jsd"}}
    grid = {"product": {"teacher": ["nano-20k"], "alpha": [0.1]}}
    cells = {
        cell.kind: cell
        for cell in expand(study(teachers=teachers, students=group(grid, run=run), seeds=[43])).cells
    }
    assert cells["teacher"].settings["optim"] == {"clip": 2.0, "lr": 0.1}
    assert (cells["teacher"].seed, cells["teacher"].settings["data"]) == (42, {"seed": 7})
    assert cells["student"].settings["optim"] == {"weight_decay": 0.0} == cells["baseline"].settings["optim"]
    assert cells["student"].settings["objective"] == {"divergence": "jsd", "alpha": 0.1}
    # another setting of the whole group makes another student, with another name
    plain = {"product": {"teacher": ["unigram"], "alpha": [0.1]}}
    (other,) = (cell for cell in expand(study(students=group(plain), seeds=[43])).cells if cell.arm)
    assert cells["student"].student == f"{other.student} optim.weight_decay 0"


def test_exclude_drops_cells_and_the_baselines_that_only_they_had():
    teachers = ["nano-20k@1M", "nano-50k@1M"]
    product = {"shape": ["nano-20k", "nano-50k"], "teacher": teachers, "alpha": [0.2, 0.8]}
    exclude = [{"shape": "nano-20k", "teacher": "nano-50k@1M"}, {"shape": "nano-20k", "alpha": [0.2, 0.8]}]
    cells = expand(study(students=group({"product": product, "exclude": exclude}), seeds=[43])).cells
    assert {cell.shape for cell in cells if cell.kind in {"student", "baseline"}} == {"nano-50k"}
    assert sum(cell.kind == "student" for cell in cells) == 4


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*@2M", {"nano-20k@2M", "nano-50k@2M"}),
        ("nano-2*", {"nano-20k@1M", "nano-20k@2M"}),
        ("nano-[25]0k@1M", {"nano-20k@1M", "nano-50k@1M"}),
        ("uni*", {"unigram"}),
        ("nano-50k@1M", {"nano-50k@1M"}),
    ],
)
def test_patterns_of_teachers(pattern, matches):
    cells = expand(study(students=group({"product": {"teacher": [pattern], "alpha": [0.4]}}))).cells
    assert {cell.teacher for cell in cells if cell.kind == "student"} == matches


def test_the_order_of_axes_in_a_file_changes_no_name():
    def names(*axes):
        values = {
            "teacher": ["unigram"],
            "alpha": [0.1],
            "temperature": [2.0],
            "lr": [1e-3],
            "optim.clip": [2],
        }
        grid = {"product": {axis: values[axis] for axis in axes}}
        return {cell.name for cell in expand(study(students=group(grid))).cells}

    given = ("teacher", "alpha", "temperature", "lr", "optim.clip")
    assert names(*given) == names(*reversed(given))


def test_a_stage_follows_students_and_baselines_alike():
    pairs = {"name": "pairs", "sources": [{"kind": "corpus_pairs", "name": "rare_diseases"}]}
    stages = {"sft": {"corpus": pairs, "tokens": "100K"}}
    grid = {"product": {"teacher": ["unigram"], "alpha": [0.1]}}
    cells = {c.name: c for c in expand(study(students=group(grid, then=["sft"]), post_training=stages)).cells}
    after = [cell for cell in cells.values() if cell.kind == "after"]
    assert len(after) == 2 * 2
    for cell in after:
        before = cells[cell.needs[0]]
        assert cell.settings["stage"] == "sft"
        if before.kind == "student":
            assert cells[cell.baseline].needs == (before.baseline,)


@pytest.mark.parametrize(
    ("students", "message"),
    [
        (group({"product": {"teacher": ["nano-2k@1M"], "alpha": [0.1]}}), "did you mean 'nano-20k@1M'"),
        (group({"product": {"teacher": ["unigram"]}}), "teacher unigram without alpha"),
        (group({"product": {"alpha": [0.1]}}), "alpha 0.1 without a teacher"),
        (group({"product": {"temprature": [2.0]}}), "did you mean 'temperature'"),
        (group({"product": {"compute_of": ["unigram"]}}), "compute_of 'unigram' is no trained teacher"),
        (group({"product": {"shape": ["nano-20k"], "tokens": ["lots"]}}), "not a token budget"),
        ({"main": {"grid": {"product": {"shape": ["nano-20k"]}}}}, "needs 'shape' and 'tokens'"),
        (group({"product": {"shape": ["nano-20k"]}}, then=["sft"]), "no stage 'sft'"),
    ],
)
def test_a_cell_that_cannot_be_built_is_named(students, message):
    with pytest.raises(UserError, match=message):
        expand(study(students=students))


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"a": {"grid": {"product": {"shape": ["nano-20k"], "tokens": ["1M"]}}}}, "axes in braces"),
        ({"{size}": {"grid": {"product": {"shape": ["nano-20k"]}}}}, "asks for 'size'"),
        (
            {"{shape}": {"grid": {"product": {"shape": ["a"], "tokens": ["1M", "2M"]}}}},
            "two teachers are called a",
        ),
        ({"a": {"shape": "nano-20k"}}, "give 'shape' and 'tokens', or 'model', or 'control'"),
        ({"a": {"control": "unigram", "model": "x"}}, "give 'shape' and 'tokens', or 'model', or 'control'"),
    ],
)
def test_a_teacher_that_is_none_is_named(teachers, message):
    with pytest.raises(UserError, match=message):
        teachers_of(study(teachers=teachers))
