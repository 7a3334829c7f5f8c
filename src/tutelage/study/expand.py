"""Expand a study file, once: its teachers by name, and its cells."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from tutelage.config.base import slug, tokens_text
from tutelage.config.load import dotted, merged
from tutelage.config.study_config import PREVIOUS, TeacherSpec
from tutelage.errors import UserError, unknown
from tutelage.study.axis_settings import (
    OWN,
    axis_of,
    cell_name,
    check_settings,
    overlay,
    own_value,
    setting_of,
    without_teacher,
    words,
)
from tutelage.study.cells import (
    Cell,
    single_names,
    teacher_cell_name,
    teacher_cells,
    teachers_of,
    trained_as,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tutelage.config.study_config import Point, StudentSpec, StudyConfig
    from tutelage.study.cells import RunKind

_CHAIN = "the same student's generation before, of the same seed; before the first, untaught"
_TWIN_STEP = 1_000_000
"""The first twin of seed 43 draws its initial weights with seed 1000043."""


@dataclass(frozen=True, slots=True)
class ExpandedStudy:
    """A study with its grids expanded.

    Attributes:
        study: the study file.
        teachers: every teacher by name, from `teachers_of`.
        trained_as: name of the teacher whose run each trained teacher is.
        cells: every run once: teachers, baselines, students, then the stages after them.
    """

    study: StudyConfig
    teachers: Mapping[str, TeacherSpec]
    trained_as: Mapping[str, str]
    cells: tuple[Cell, ...]


def expand(study: StudyConfig) -> ExpandedStudy:
    """Expand the grids of `study`.

    Raises:
        UserError: a teacher or a cell cannot be built; the message names it.
    """
    teachers = teachers_of(study)
    run_of = trained_as(teachers)
    _check_runs(study)
    trained = {name: teachers[name] for name in dict.fromkeys(run_of.values())}
    cells = {cell.name: cell for cell in teacher_cells(study, trained)}
    for group, spec in study.students.items():
        where = f"study {study.name}: students.{group}"
        points = list(_with_teachers(spec.grid.points(), teachers, where))
        _check_chain(spec, points, where)
        if spec.seeds and any("seed" in point for point in points):
            raise UserError(f"{where}: seeds are given and are an axis too; give one of them")
        for point in points:
            own = [own_value("seed", point["seed"], where)] if "seed" in point else None
            for seed in own or spec.seeds or study.seeds:
                for cell in _student_cells(study, group, point, seed, teachers, run_of):
                    _add(cells, cell)
    if any(cell.teacher == PREVIOUS for cell in cells.values()):
        teachers = teachers | {PREVIOUS: TeacherSpec(description=_CHAIN)}
    order: dict[RunKind, int] = {"teacher": 0, "baseline": 1, "student": 2, "after": 3}
    return ExpandedStudy(
        study, teachers, run_of, tuple(sorted(cells.values(), key=lambda cell: order[cell.kind]))
    )


def _check_chain(spec: StudentSpec, points: list[Point], where: str) -> None:
    chained = any(point.get("teacher") == PREVIOUS for point in points)
    if chained and spec.generations is None:
        raise UserError(f"{where}: teacher {PREVIOUS} is a chain; give 'generations', how many there are")
    if spec.generations is not None and not chained:
        raise UserError(
            f"{where}: generations = {spec.generations}, but no point has the teacher {PREVIOUS}; add it to "
            "the axis 'teacher', or drop generations"
        )


def _check_runs(study: StudyConfig) -> None:
    where = f"study {study.name}"
    check_settings(study.run, where)
    for group, students in study.students.items():
        check_settings(students.run, f"{where}: students.{group}")
    for name, teacher in study.teachers.items():
        check_settings(teacher.run, f"{where}: teachers.{name}")
    for name, stage in study.post_training.items():
        check_settings(stage.run, f"{where}: post_training.{name}")


def _add(cells: dict[str, Cell], cell: Cell) -> None:
    """Add a cell once, also where two groups ask for it; different cells must not share a name."""
    known = cells.setdefault(cell.name, cell)
    if known.model_copy(update={"group": cell.group}) != cell:
        raise UserError(
            f"two runs would both be called {cell.name}: {_described(known)}, and {_described(cell)}; rename "
            "what they are named by"
        )


def _described(cell: Cell) -> str:
    """Describe a cell for a message."""
    parts = [f"student '{cell.student}'", cell.teacher and f"teacher '{cell.teacher}'", cell.arm, cell.stage]
    return f"group {cell.group}, " + ", ".join(part for part in parts if part)


def _teacher_seed(study: StudyConfig, seed: int, where: str) -> int | None:
    """Seed of the teachers from which students of `seed` learn; None where all seeds share them."""
    if not study.teacher_seeds:
        return None
    if seed not in study.seeds:
        raise UserError(
            f"{where}: seed {seed} is not among the study's seeds {[*study.seeds]}, so none of teacher_seeds "
            "is its own; add it to both"
        )
    return study.teacher_seeds[study.seeds.index(seed)]


def _with_teachers(points: list[Point], teachers: Mapping[str, TeacherSpec], where: str) -> Iterator[Point]:
    """The points, each whose teacher is a pattern ("*@50B") repeated for every teacher that matches."""
    for point in points:
        wanted = point.get("teacher")
        if wanted is None or wanted == PREVIOUS:
            yield point
            continue
        names = [name for name in teachers if name == wanted or fnmatchcase(name, str(wanted))]
        if not names:
            raise unknown(f"{where}: teacher", str(wanted), [*teachers, PREVIOUS])
        yield from (point | {"teacher": name} for name in names)


def _student_cells(
    study: StudyConfig,
    group: str,
    point: Point,
    seed: int,
    teachers: Mapping[str, TeacherSpec],
    run_of: Mapping[str, str],
) -> Iterator[Cell]:
    """The student of a point and seed, its baselines, and the stages that follow each."""
    spec = study.students[group]
    where = f"study {study.name}: students.{group}"
    shape, budget = point.get("shape", spec.shape), point.get("tokens", spec.tokens)
    if shape is None or budget is None:
        raise UserError(f"{where}: a student needs 'shape' and 'tokens', in the group or as an axis")
    tokens = own_value("tokens", budget, where)
    shape = own_value("shape", shape, where)
    teaching, shared = _split_axes({axis: value for axis, value in point.items() if axis not in OWN})
    own = {"seed": seed, "model": {"shape": shape}, "data": {"seed": seed}}
    settings = merged(own, merged(study.run, merged(spec.run, overlay(shared, where))))
    student = _joined([str(shape), tokens_text(tokens), words(shared), _group_words(spec)])
    baseline = Cell(
        name=cell_name(["student", student], seed),
        kind="baseline",
        group=group,
        student=student,
        teacher=None,
        seed=seed,
        shape=str(shape),
        tokens=tokens,
        settings=without_teacher(settings) | {"tokens": tokens},
    )
    cells = [baseline, *(_twin_cell(baseline, number) for number in range(1, study.baselines))]
    if (teacher := point.get("teacher")) is not None:
        taught = _taught_cell(baseline, str(teacher), teaching, where)
        settings = merged({"objective": settings.get("objective", {})}, taught.settings)
        taught = taught.model_copy(update={"settings": settings})
        if teacher == PREVIOUS:
            cells += _generations(taught, baseline, spec.generations or 0)
        else:
            cells.append(_with_needs(taught, study, teachers, run_of, where))
    elif (matched := point.get("compute_of")) is not None:
        cells.append(_matched_cell(baseline, str(matched), teachers, where))
    elif teaching:
        raise UserError(f"{where}: {words(teaching)} without a teacher; add the axis 'teacher'")
    for cell in cells:
        yield cell
        yield from (_stage_cell(study, cell, stage) for stage in spec.then)


def _with_needs(
    taught: Cell,
    study: StudyConfig,
    teachers: Mapping[str, TeacherSpec],
    run_of: Mapping[str, str],
    where: str,
) -> Cell:
    """A taught cell with the cells that train its teacher, or each teacher that a mean is of."""
    assert taught.teacher is not None  # noqa: S101 - what taught means
    needs, own = [], None
    for name in single_names(taught.teacher, teachers):
        if (run := run_of.get(name)) is None:
            continue
        each = teachers[run].seed is None
        seed = _teacher_seed(study, taught.seed, where) if each else None
        needs.append(teacher_cell_name(run, seed))
        own = needs[0] if each and name == taught.teacher else None
    return taught.model_copy(update={"needs": tuple(needs), "learned": own})


def _generations(taught: Cell, baseline: Cell, count: int) -> Iterator[Cell]:
    """The generations of a chain, each with the one before as teacher; before the first is the baseline."""
    before = baseline
    for number in range(1, count + 1):
        arm = (taught.arm_settings or {}) | {"generation": number}
        name = cell_name(["student", taught.student, PREVIOUS, words(arm)], taught.seed)
        update = {"name": name, "arm_settings": arm, "needs": (before.name,), "learned": before.name}
        before = taught.model_copy(update=update)
        yield before


def _twin_cell(baseline: Cell, number: int) -> Cell:
    """The same untaught run from other initial weights; the order of the batches stays."""
    seed = baseline.settings["seed"] + _TWIN_STEP * number
    return baseline.model_copy(
        update={
            "name": f"{baseline.name}-w{number}",
            "settings": baseline.settings | {"seed": seed},
            "twin": number,
        }
    )


def _split_axes(factors: Point) -> tuple[Point, Point]:
    """Split axis values into those of the objective and those that the baseline shares."""
    teaching = {axis for axis in factors if setting_of(axis).startswith("objective.")}
    return (
        {axis: value for axis, value in factors.items() if axis in teaching},
        {axis: value for axis, value in factors.items() if axis not in teaching},
    )


def _taught_cell(baseline: Cell, teacher: str, teaching: Point, where: str) -> Cell:
    settings = overlay(teaching, where)
    arm = {axis_of(axis): value for axis, value in teaching.items()}  # claims know them by their short names
    if "alpha" not in arm:
        raise UserError(f"{where}: teacher {teacher} without alpha; add the axis 'alpha'")
    return baseline.model_copy(
        update={
            "name": cell_name(["student", baseline.student, teacher, words(arm)], baseline.seed),
            "kind": "student",
            "teacher": teacher,
            "arm_settings": arm,
            "settings": merged(baseline.settings, settings),
            "baseline": baseline.name,
        }
    )


def _matched_cell(baseline: Cell, teacher: str, teachers: Mapping[str, TeacherSpec], where: str) -> Cell:
    parts = single_names(teacher, teachers) if teacher in teachers else ()
    if not parts or any(teachers[name].shape is None for name in parts):
        known = ", ".join(teachers)
        raise UserError(f"{where}: compute_of {teacher!r} is no trained teacher; known: {known}")
    arm = {"compute_of": teacher}
    return baseline.model_copy(
        update={
            "name": cell_name(["student", baseline.student, words(arm)], baseline.seed),
            "kind": "student",
            "arm_settings": arm,
            "baseline": baseline.name,
        }
    )


def _stage_cell(study: StudyConfig, cell: Cell, stage: str) -> Cell:
    """The post-training of a run, compared with that of its baseline."""
    spec = study.post_training[stage]
    seed = {"seed": cell.seed, "data": {"seed": cell.seed}}
    settings = merged(
        merged(without_teacher(study.run), spec.run), seed | {"stage": "sft", "tokens": spec.tokens}
    )
    return cell.model_copy(
        update={
            "name": f"{cell.name}-{slug(stage)}",
            "kind": "after",
            "tokens": spec.tokens,
            "settings": settings,
            "needs": (cell.name,),
            "baseline": None if cell.baseline is None else f"{cell.baseline}-{slug(stage)}",
            "stage": stage,
        }
    )


def _group_words(spec: StudentSpec) -> str:
    """A word for the settings of a group, which are part of the student setting's name."""
    return words({axis_of(path): value for path, value in dotted(without_teacher(spec.run))})


def _joined(parts: list[str]) -> str:
    return " ".join(part for part in parts if part)
