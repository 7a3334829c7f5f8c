"""From a study file to its cells: every run that is to be, by name, before any text or model exists."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from tutelage.config.base import Budget, Fraction, Name, Seed, refuse_alike, slug, tokens_text
from tutelage.config.load import digest, merged
from tutelage.errors import UserError
from tutelage.study.axis_settings import OWN, cell_name, check_settings, overlay, setting_of, words
from tutelage.study.trunks import branched

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tutelage.config.grid import Point
    from tutelage.config.study_config import StudentSpec, StudyConfig, TeacherSpec

Kind = Literal["teacher", "baseline", "student", "after"]
_OWN_TYPES: dict[str, TypeAdapter[Any]] = {
    "rung": TypeAdapter(Name),
    "tokens": TypeAdapter(Budget),
    "seed": TypeAdapter(Seed),
    "tested_alpha": TypeAdapter(Fraction | None),
}

_TWIN_STEP = 1_000_000
"""The first twin of seed 43 draws its initial weights with seed 1000043."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study, by what it stands for.

    Attributes:
        name: readable and unique; the run's directory is `<name>-<hash8>`.
        kind: a teacher, a student without one (baseline), a student with one, or a stage after one of them.
        group: the student group that asked for it; of a teacher, "teachers".
        student: name of shape, budget and settings that a student shares with its baseline; None: teacher.
        teacher: own name of a teacher, the teacher's of a student; None: no teacher.
        arm: what is done with the teacher, in words: "alpha 0.2, temperature 4"; None where nothing is.
        alpha: weight of the distillation loss where it is one number.
        seed: of the weights; students are paired by it.
        rung: shape of the trained model.
        tokens: its budget as written.
        settings: of the run, as in a run file, less stores, models and teachers.
        needs: names of cells to be finished first.
        baseline: name of the cell a student is compared with.
        stage: name of the post-training stage of kind "after".
        compute_of: teacher whose forward's cost this untaught student gets as more tokens.
        trunk: name of the cell of a shorter run that this one is a branch of.
        learned: name of its teacher's cell, where each seed has a teacher of its own.
        twin: 0, or the number of an untaught run beside the one of its seed, which has other initial weights
            and the same batches.
    """

    name: str
    kind: Kind
    group: str
    student: str | None
    teacher: str | None
    arm: str | None
    alpha: float | None
    seed: int
    rung: str
    tokens: int | str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    baseline: str | None = None
    stage: str | None = None
    compute_of: str | None = None
    trunk: str | None = None
    learned: str | None = None
    twin: int = 0


def teachers_of(study: StudyConfig) -> dict[str, TeacherSpec]:
    """Every teacher by name, grids expanded; `rung`, `tokens`, `seed` and `run` of each are its own.

    A teacher's `seed` is None where each seed of the students has a teacher of its own.

    Raises:
        UserError: a name appears twice or lacks an axis of its grid, or a teacher is not one of its kinds; or
            two names would be one as directories.
    """
    found: dict[str, TeacherSpec] = {}
    for pattern, spec in study.teachers.items():
        for point in spec.grid.points() if spec.grid is not None else [{}]:
            where = f"study {study.name}: teachers.{pattern}"
            name = _filled(pattern, _as_named(point, where), where)
            if name in found:
                raise UserError(f"{where}: two teachers are called {name}; name every axis of the grid")
            found[name] = _one_teacher(
                spec, point, None if study.teacher_seeds else study.teacher_seed, where
            )
    try:
        refuse_alike("teachers", found)
    except ValueError as error:
        raise UserError(f"study {study.name}: {error}") from None
    return found


def trained_as(teachers: Mapping[str, TeacherSpec]) -> dict[str, str]:
    """The name that each trained teacher's run goes by: teachers that differ in targets alone are one run."""
    training = {"rung", "tokens", "seed", "run", "corpus", "trunk"}
    first: dict[str, str] = {}
    return {
        name: first.setdefault(digest(spec.model_dump(mode="json", include=training)), name)
        for name, spec in teachers.items()
        if spec.rung is not None
    }


def cells_of(study: StudyConfig) -> list[Cell]:
    """Every run of `study` once: teachers, baselines, students, then what follows them.

    Raises:
        UserError: a cell cannot be built; the message names it.
    """
    teachers = teachers_of(study)
    run_of = trained_as(teachers)
    _check_runs(study)
    trained = {name: teachers[name] for name in dict.fromkeys(run_of.values())}
    alone = [
        _teacher_cell(study, name, spec, seed)
        for name, spec in trained.items()
        for seed in (study.teacher_seeds if spec.seed is None else [spec.seed])
    ]
    cells = {cell.name: cell for cell in branched(alone, trained)}
    for group, spec in study.students.items():
        where = f"study {study.name}: students.{group}"
        points = list(_with_teachers(spec.grid.points(), teachers, where))
        if spec.seeds and any("seed" in point for point in points):
            raise UserError(f"{where}: seeds are given and are an axis too; give one of them")
        for point in points:
            own = [_typed("seed", point["seed"], where)] if "seed" in point else None
            for seed in own or spec.seeds or study.seeds:
                for cell in _student_cells(study, group, point, seed, teachers, run_of):
                    _add(cells, cell)
    order: dict[Kind, int] = {"teacher": 0, "baseline": 1, "student": 2, "after": 3}
    return sorted(cells.values(), key=lambda cell: order[cell.kind])


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
    """A cell that two groups ask for is one run; different cells must not share a name."""
    known = cells.setdefault(cell.name, cell)
    if replace(known, group=cell.group) != cell:
        raise UserError(
            f"two runs would both be called {cell.name}: {_said(known)}, and {_said(cell)}; rename what they "
            "are named by"
        )


def _said(cell: Cell) -> str:
    """What tells a cell from others, for a message."""
    parts = [f"student '{cell.student}'", cell.teacher and f"teacher '{cell.teacher}'", cell.arm, cell.stage]
    return f"group {cell.group}, " + ", ".join(part for part in parts if part)


def _as_named(point: Point, where: str) -> Point:
    """The point with its budget in the one spelling that names have."""
    return point | {axis: tokens_text(_typed(axis, point[axis], where)) for axis in point if axis == "tokens"}


def _filled(pattern: str, point: Point, where: str) -> str:
    try:
        name = pattern.format(**point)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: the name asks for {error}; axes of the grid: {sorted(point)}") from None
    if point and name == pattern:
        raise UserError(f"{where}: with a grid, the name needs its axes in braces: {{{'}@{'.join(point)}}}")
    return name


def _one_teacher(spec: TeacherSpec, point: Point, seed: int | None, where: str) -> TeacherSpec:
    own = {axis: _typed(axis, value, where) for axis, value in point.items() if axis in _OWN_TYPES}
    settings = {axis: value for axis, value in point.items() if axis not in own}
    one = spec.model_copy(
        update={"seed": spec.seed if spec.seed is not None else seed}
        | own
        | {"run": merged(spec.run, overlay(settings, where)), "grid": None}
    )
    kinds = [one.rung is not None, one.model is not None, one.control is not None]
    if sum(kinds) != 1 or (one.rung is None) != (one.tokens is None):
        raise UserError(f"{where}: give 'rung' and 'tokens', or 'model', or 'control'")
    return one


def _teacher_cell(study: StudyConfig, name: str, spec: TeacherSpec, seed: int) -> Cell:
    assert spec.rung is not None and spec.tokens is not None  # noqa: S101, PT018 - checked
    settings = {"seed": seed, "model": {"rung": spec.rung}, "data": {"seed": seed}}
    return Cell(
        name=_teacher_name(name, None if spec.seed is not None else seed),
        kind="teacher",
        group="teachers",
        student=None,
        teacher=name,
        arm=None,
        alpha=None,
        seed=seed,
        rung=spec.rung,
        tokens=spec.tokens,
        settings=merged(study.run, merged(settings, spec.run)) | {"tokens": spec.tokens},
    )


def _teacher_name(name: str, seed: int | None) -> str:
    """Name of a teacher's cell; `seed` tells those of one teacher apart."""
    return f"teacher-{slug(name)}" if seed is None else f"teacher-{slug(name)}-s{seed}"


def _teacher_seed(study: StudyConfig, seed: int, where: str) -> int | None:
    """Seed of the teachers of the students of `seed`; None where all have the same."""
    if not study.teacher_seeds:
        return None
    if seed not in study.seeds:
        raise UserError(
            f"{where}: seed {seed} is not among the study's seeds {[*study.seeds]}, so none of teacher_seeds "
            "is its own; add it to both"
        )
    return study.teacher_seeds[study.seeds.index(seed)]


def _typed(axis: str, value: object, where: str) -> Any:  # noqa: ANN401 - a type for each axis
    """The value of an axis of a run's own, in the spelling that every other way of saying it has too."""
    try:
        return _OWN_TYPES[axis].validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {axis} = {value!r:.80}: {reason}") from None


def _with_teachers(points: list[Point], teachers: Mapping[str, TeacherSpec], where: str) -> Iterator[Point]:
    """Every point, those whose teacher is a pattern ("*@50B") once per teacher that matches."""
    for point in points:
        wanted = point.get("teacher")
        if wanted is None:
            yield point
            continue
        names = [name for name in teachers if name == wanted or fnmatchcase(name, str(wanted))]
        if not names:
            near = difflib.get_close_matches(str(wanted), teachers, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"{where}: teacher {wanted!r:.80} is unknown; {hint}known: {', '.join(teachers)}")
        yield from (point | {"teacher": name} for name in names)


def _student_cells(
    study: StudyConfig,
    group: str,
    point: Point,
    seed: int,
    teachers: Mapping[str, TeacherSpec],
    run_of: Mapping[str, str],
) -> Iterator[Cell]:
    """The student of a point, the baseline it is compared with, and the stages that follow each."""
    spec = study.students[group]
    where = f"study {study.name}: students.{group}"
    rung, budget = point.get("rung", spec.rung), point.get("tokens", spec.tokens)
    if rung is None or budget is None:
        raise UserError(f"{where}: a student needs 'rung' and 'tokens', in the group or as an axis")
    tokens = _typed("tokens", budget, where)
    rung = _typed("rung", rung, where)
    teaching, shared = _told_apart({axis: value for axis, value in point.items() if axis not in OWN})
    own = {"seed": seed, "model": {"rung": rung}, "data": {"seed": seed}}
    settings = merged(own, merged(study.run, merged(spec.run, overlay(shared, where))))
    objective = settings.pop("objective", {})  # a baseline has none, whatever the group's students have
    student = _joined([str(rung), tokens_text(tokens), words(shared), _own_words(spec)])
    baseline = Cell(
        name=cell_name(["student", student], seed),
        kind="baseline",
        group=group,
        student=student,
        teacher=None,
        arm=None,
        alpha=None,
        seed=seed,
        rung=str(rung),
        tokens=tokens,
        settings=settings | {"tokens": tokens},
    )
    cells = [baseline, *(_twin(baseline, number) for number in range(1, study.baselines))]
    if (teacher := point.get("teacher")) is not None:
        taught = _taught(baseline, str(teacher), teaching, where)
        if (run := run_of.get(teacher)) is not None:
            each = teachers[run].seed is None
            learned = _teacher_name(run, _teacher_seed(study, seed, where) if each else None)
            taught = replace(taught, needs=(learned,), learned=learned if each else None)
        cells.append(replace(taught, settings=merged({"objective": objective}, taught.settings)))
    elif (matched := point.get("compute_of")) is not None:
        cells.append(_compute_matched(baseline, str(matched), teachers, where))
    elif teaching:
        raise UserError(f"{where}: {words(teaching)} without a teacher; add the axis 'teacher'")
    for cell in cells:
        yield cell
        yield from (_after(study, cell, stage) for stage in spec.then)


def _twin(baseline: Cell, number: int) -> Cell:
    """The same untaught run from other initial weights: what reads the batches in their order stays."""
    seed = baseline.settings["seed"] + _TWIN_STEP * number
    return replace(
        baseline,
        name=f"{baseline.name}-w{number}",
        settings=baseline.settings | {"seed": seed},
        twin=number,
    )


def _told_apart(factors: Point) -> tuple[Point, Point]:
    """(what is done with the teacher, what the baseline shares)."""
    teaching = {axis for axis in factors if setting_of(axis).startswith("objective.")}
    return (
        {axis: value for axis, value in factors.items() if axis in teaching},
        {axis: value for axis, value in factors.items() if axis not in teaching},
    )


def _taught(baseline: Cell, teacher: str, teaching: Point, where: str) -> Cell:
    if "alpha" not in teaching:
        raise UserError(f"{where}: teacher {teacher} without alpha; add the axis 'alpha'")
    alpha = teaching["alpha"]
    arm = words(teaching)
    return replace(
        baseline,
        name=cell_name(["student", baseline.student, teacher, arm], baseline.seed),
        kind="student",
        teacher=teacher,
        arm=arm,
        alpha=float(alpha) if isinstance(alpha, int | float) and 0 <= alpha <= 1 else None,
        settings=merged(baseline.settings, overlay(teaching, where)),
        baseline=baseline.name,
    )


def _compute_matched(baseline: Cell, teacher: str, teachers: Mapping[str, TeacherSpec], where: str) -> Cell:
    if teacher not in teachers or teachers[teacher].rung is None:
        known = ", ".join(teachers)
        raise UserError(f"{where}: compute_of {teacher!r} is no trained teacher; known: {known}")
    arm = f"compute of {teacher}"
    return replace(
        baseline,
        name=cell_name(["student", baseline.student, arm], baseline.seed),
        kind="student",
        arm=arm,
        baseline=baseline.name,
        compute_of=teacher,
    )


def _after(study: StudyConfig, cell: Cell, stage: str) -> Cell:
    """A run's post-training: the same stage for all, compared with the baseline's."""
    spec = study.post_training[stage]
    seed = {"seed": cell.seed, "data": {"seed": cell.seed}}
    settings = merged(merged(study.run, spec.run), seed | {"stage": "sft", "tokens": spec.tokens})
    return replace(
        cell,
        name=f"{cell.name}-{slug(stage)}",
        kind="after",
        tokens=spec.tokens,
        settings=settings,
        needs=(cell.name,),
        baseline=None if cell.baseline is None else f"{cell.baseline}-{slug(stage)}",
        stage=stage,
        compute_of=None,
    )


def _own_words(spec: StudentSpec) -> str:
    """Settings of a whole group are part of what its students are."""
    settings = {key: value for key, value in spec.run.items() if key != "objective"}
    return f"settings {digest(settings)}" if settings else ""


def _joined(parts: list[str]) -> str:
    return " ".join(part for part in parts if part)
