"""Cells, the runs of a study before any text or model exists; the cells that train its teachers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from tutelage.config.base import Name, Section, parse_tokens, refuse_alike, slug, tokens_text
from tutelage.config.load import digest, merged
from tutelage.config.study_config import PREVIOUS, TeacherSpec
from tutelage.errors import UserError, unknown
from tutelage.study.axis_settings import TEACHER_FIELDS, overlay, own_value, without_teacher, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tutelage.config.study_config import Point, StudyConfig

RunKind = Literal["teacher", "baseline", "student", "after"]

_ANY_PARAMETERS = 1_000_000
"""Sorts budgets per parameter, of models that are not there yet: enough to tell 1.5x from 1.6x."""


class RunLabels(Section):
    """What a run of a study stands for; runs that differ in seed and twin alone are replicates."""

    kind: RunKind = Field(
        description="a teacher, a student without one (baseline), a student with one, or a stage after one"
    )
    group: str = Field(description="student group of the study file that asked for it; teachers: 'teachers'")
    student: str | None = Field(
        description="name of the shape, budget and settings shared with its baseline; null for teachers"
    )
    teacher: str | None = Field(description="its own name (teacher), its teacher's, or null")
    arm_settings: dict[str, JsonValue] | None = Field(
        None,
        description="what is done with the teacher: {alpha: 0.2, temperature: 4}; null for teachers and "
        "baselines; an untaught student with some, {compute_of: strong}, is another control",
    )
    seed: int = Field(description="seed of the run; a student is compared with the baseline of its seed")
    stage: Name | None = Field(None, description="post-training stage (kind after)")
    twin: int = Field(
        0,
        ge=0,
        description="of an untaught run: 0, or the number of a further one of its seed, with other initial "
        "weights and the same batches; gains are against the mean of all",
    )

    @property
    def arm(self) -> str | None:
        """`arm_settings` in words, the name of the arm in tables."""
        return None if self.arm_settings is None else words(self.arm_settings)

    @property
    def alpha(self) -> float | None:
        """Weight of the distillation loss where it is one number."""
        alpha = (self.arm_settings or {}).get("alpha")
        return float(alpha) if isinstance(alpha, int | float) and 0 <= alpha <= 1 else None

    @property
    def constant(self) -> bool:
        """Whether a constant alpha is all there is to the arm."""
        return self.alpha is not None and self.arm_settings == {"alpha": self.alpha}

    def labels(self) -> dict[str, Any]:
        """These fields alone, for another record of the same run."""
        return self.model_dump(include=set(RunLabels.model_fields))


class Cell(RunLabels):
    """One run of a study before it has a run id."""

    name: str = Field(description="readable and unique; the run's directory is `<name>-<hash8>`")
    shape: str = Field(description="shape of the trained model")
    tokens: int | str = Field(description="budget as written")
    settings: dict[str, Any] = Field(
        description="of the run, as in a run file, without stores, models and teachers"
    )
    needs: tuple[str, ...] = Field((), description="names of cells to be finished first")
    baseline: str | None = Field(None, description="name of the cell a student is compared with")
    branch_from: str | None = Field(None, description="cell of the shorter run that this one is a branch of")
    learned: str | None = Field(
        None, description="cell of its teacher, where each seed has a teacher of its own"
    )

    @property
    def compute_of(self) -> str | None:
        """Teacher whose forward passes this untaught student gets the cost of, as more tokens."""
        matched = (self.arm_settings or {}).get("compute_of")
        return str(matched) if matched is not None and self.kind == "student" else None


def beside(cell: Cell, teachers: Mapping[str, TeacherSpec]) -> list[TeacherSpec]:
    """The teachers that run beside a student, or whose cost an untaught one gets: several of a mean.

    The teacher of a chain is a model of the student's own shape.
    """
    name = cell.compute_of or (cell.teacher if cell.kind == "student" else None)
    if name is None:
        return []
    if name == PREVIOUS:
        return [TeacherSpec(shape=cell.shape, tokens=cell.tokens)]
    return [teachers[one] for one in single_names(name, teachers)]


def single_names(name: str, teachers: Mapping[str, TeacherSpec]) -> tuple[str, ...]:
    """Names of the teachers that a mean is of; of another teacher its own."""
    return teachers[name].mean or (name,)


def teachers_of(study: StudyConfig) -> dict[str, TeacherSpec]:
    """Expand the grids of a study's teachers: each teacher with its own shape, tokens, seed and run, by name.

    A teacher's `seed` is None where each seed of the students has a teacher of its own. Patterns of a mean
    have become names.

    Raises:
        UserError: a name appears twice or lacks an axis of its grid, or a teacher is not one of its kinds; or
            two names would be one as directories; or a mean is of teachers that it cannot be of.
    """
    found: dict[str, TeacherSpec] = {}
    for pattern, spec in study.teachers.items():
        for point in spec.grid.points() if spec.grid is not None else [{}]:
            where = f"study {study.name}: teachers.{pattern}"
            name = _filled(pattern, point, where)
            if name in found:
                raise UserError(f"{where}: two teachers are called {name}; name every axis of the grid")
            found[name] = _one_teacher(
                spec, point, None if study.teacher_seeds else study.teacher_seed, where
            )
    try:
        refuse_alike("teachers", found)
    except ValueError as error:
        raise UserError(f"study {study.name}: {error}") from None
    return {name: _named_parts(name, spec, found, f"study {study.name}") for name, spec in found.items()}


def _named_parts(name: str, spec: TeacherSpec, known: Mapping[str, TeacherSpec], study: str) -> TeacherSpec:
    """A mean with the patterns of its teachers replaced by their names."""
    if spec.mean is None:
        return spec
    where, names = f"{study}: teachers.{name}.mean", dict[str, None]()
    for wanted in spec.mean:
        found = [one for one in known if one == wanted or (one != name and fnmatchcase(one, wanted))]
        if not found:
            raise unknown(where, wanted, [one for one in known if one != name])
        names |= dict.fromkeys(found)
    if nested := [one for one in names if known[one].mean is not None]:
        raise UserError(f"{where}: {nested[0]} is a mean itself; name the teachers that it is of")
    runs = trained_as({one: known[one] for one in names})
    if len(set(runs.values())) < len(runs):
        raise UserError(f"{where}: {', '.join(runs)} are the same run with other targets; name it once")
    if len(names) == 1:
        raise UserError(f"{where}: {next(iter(names))} alone; a mean is of two teachers or more")
    if spec.cache is not None and spec.cache.format.kind == "hidden":
        raise UserError(
            f"{study}: teachers.{name}.cache.format.kind = hidden: a mean of teachers has no hidden states; "
            "use topk, sample_multinomial or sample_min_variance"
        )
    return spec.model_copy(update={"mean": tuple(names)})


def trained_as(teachers: Mapping[str, TeacherSpec]) -> dict[str, str]:
    """Name of the teacher whose run each trained teacher is: those that differ in targets alone share one."""
    training = {"shape", "tokens", "seed", "run", "corpus", "branch_from_shorter"}
    first: dict[str, str] = {}
    return {
        name: first.setdefault(digest(spec.model_dump(mode="json", include=training)), name)
        for name, spec in teachers.items()
        if spec.shape is not None
    }


def teacher_cells(study: StudyConfig, trained: Mapping[str, TeacherSpec]) -> list[Cell]:
    """The runs of the teachers that the study trains, one each or one for each of `teacher_seeds`."""
    return _branched(
        [
            _teacher_cell(study, name, spec, seed)
            for name, spec in trained.items()
            for seed in (study.teacher_seeds if spec.seed is None else [spec.seed])
        ],
        trained,
    )


def teacher_cell_name(name: str, seed: int | None) -> str:
    """Name of a teacher's cell; `seed` is given where each seed has a teacher of its own."""
    return f"teacher-{slug(name)}" if seed is None else f"teacher-{slug(name)}-s{seed}"


def _filled(pattern: str, point: Point, where: str) -> str:
    """Fill a pattern with a point's values, its budget in the spelling of names."""
    named = point | {
        axis: tokens_text(own_value(axis, point[axis], where)) for axis in point if axis == "tokens"
    }
    try:
        name = pattern.format(**named)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: the name asks for {error}; axes of the grid: {sorted(point)}") from None
    if point and name == pattern:
        raise UserError(f"{where}: with a grid, the name needs its axes in braces: {{{'}@{'.join(point)}}}")
    return name


def _one_teacher(spec: TeacherSpec, point: Point, seed: int | None, where: str) -> TeacherSpec:
    own = {axis: own_value(axis, value, where) for axis, value in point.items() if axis in TEACHER_FIELDS}
    settings = {axis: value for axis, value in point.items() if axis not in own}
    one = spec.model_copy(
        update={"seed": spec.seed if spec.seed is not None else seed}
        | own
        | {"run": merged(spec.run, overlay(settings, where)), "grid": None}
    )
    kinds = [kind is not None for kind in (one.shape, one.model, one.control, one.mean)]
    if sum(kinds) != 1 or (one.shape is None) != (one.tokens is None):
        raise UserError(f"{where}: give 'shape' and 'tokens', or 'model', or 'control', or 'mean'")
    return one


def _teacher_cell(study: StudyConfig, name: str, spec: TeacherSpec, seed: int) -> Cell:
    assert spec.shape is not None and spec.tokens is not None  # noqa: S101, PT018 - checked
    settings = {"seed": seed, "model": {"shape": spec.shape}, "data": {"seed": seed}}
    return Cell(
        name=teacher_cell_name(name, None if spec.seed is not None else seed),
        kind="teacher",
        group="teachers",
        student=None,
        teacher=name,
        seed=seed,
        shape=spec.shape,
        tokens=spec.tokens,
        settings=merged(without_teacher(study.run), merged(settings, spec.run)) | {"tokens": spec.tokens},
    )


def _branched(cells: Iterable[Cell], teachers: Mapping[str, TeacherSpec]) -> list[Cell]:
    """The teachers' cells, each budget of a branched teacher started from the next shorter one's run."""
    found: list[Cell] = []
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        spec = teachers[str(cell.teacher)]
        if not spec.branch_from_shorter:
            found.append(cell)
            continue
        recipe = {key: value for key, value in cell.settings.items() if key != "tokens"}
        corpus = None if spec.corpus is None else spec.corpus.model_dump(mode="json")
        families.setdefault(digest([recipe, corpus]), []).append(cell)
    for family in families.values():
        if len(unlike := {isinstance(cell.tokens, str): cell for cell in family}) > 1:
            raise UserError(
                f"{unlike[False].name} and {unlike[True].name}: one branches from the other, and which is "
                "shorter is not known yet; give tokens of both as numbers or both per parameter, not "
                f"{tokens_text(unlike[False].tokens)} and {unlike[True].tokens}"
            )
        family.sort(key=lambda cell: parse_tokens(cell.tokens, _ANY_PARAMETERS))
        for shorter, cell in zip([None, *family], family, strict=False):
            start = {} if shorter is None else {"branch_from": shorter.name, "needs": (shorter.name,)}
            settings = merged(cell.settings, {"checkpoint": {"keep_before_decay": cell is not family[-1]}})
            found.append(cell.model_copy(update=start | {"settings": settings}))
    return found
