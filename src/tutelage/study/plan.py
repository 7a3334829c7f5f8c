"""`plan.json`: the runs of a study, or its cells before anything has a run id."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from tutelage.config.base import Fraction, Name, Section, Words, for_people
from tutelage.config.load import validate
from tutelage.errors import UserError, check_visible
from tutelage.names import located
from tutelage.records import UnreadableError, read_sealed, write_sealed
from tutelage.run_directory import RunDirectory, evaluation_id
from tutelage.study.axis_settings import words
from tutelage.study.cells import RunLabels, single_names
from tutelage.study.nodes import Cost, check_cells
from tutelage.types import Role

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tutelage.config.data_config import StoreConfig
    from tutelage.config.study_config import StudyConfig
    from tutelage.study.cells import Cell
    from tutelage.study.expand import ExpandedStudy
    from tutelage.study.nodes import Node

    Planned = tuple[Cell, "PlanRun"]


_REMEDY = "`tutelage study run` writes it again"

SCHEMA: Final = 3
"""Version of the format of `plan.json`. 2: an arm was a sentence, a shape a rung."""


class PlanStudent(Section):
    """A student setting: what a baseline and the students compared with it have in common."""

    name: Words = Field(description="name in tables and figures")
    shape: Words = Field(description="name in the ladder")
    tokens: int = Field(ge=1, description="training tokens of each run")
    parameters: int = Field(ge=1, description="parameters, embeddings included")


class PlanTeacher(Section):
    """One teacher, or a control in a teacher's place."""

    name: Words = Field(description="name in tables and figures")
    control: bool = Field(description="true if it knows nothing of the context, like the unigram")
    description: Words = Field(description="what it is, in a few words")
    shape: str | None = Field(
        None, description="its shape; null for controls, given models, means and chains"
    )
    of: tuple[Words, ...] = Field(
        (), description="names of the teachers that a mean is of, as their runs have them"
    )
    tokens: int | None = Field(None, description="its training tokens, where the study trains it")
    parameters: int | None = Field(None, description="parameters, embeddings included, where known")
    run: Name | None = Field(
        None, description="run id, where the study trains it once; null where each seed has its own"
    )
    data_seed: int | None = Field(None, description="seed of its data order, where the study trains it once")
    corpus: str | None = Field(None, description="name of its training text, where it has one of its own")
    targets: str | None = Field(None, description="format of its cached targets; null: computed as needed")
    texts: tuple[Name, ...] = Field((), description="scored texts that its training text is made of")
    tested_alpha: Fraction | None = Field(
        None,
        description="constant alpha of the claims' tests; null: chosen on the first third of the seeds",
    )


class PlanDomain(Section):
    """One scored text."""

    name: Name = Field(description="name in tables and figures")
    role: Role = Field(description="is this the training distribution?")


class PlanRun(RunLabels):
    """One run, with what it is expected to cost and the runs it belongs to."""

    run: Name = Field(description="run id, the name of its directory")
    tokens: int = Field(ge=1, description="training tokens")
    parameters: int = Field(ge=1, description="parameters, embeddings included")
    flops: float = Field(ge=0, description="estimate of its training, a live teacher included")
    baseline: Name | None = Field(description="run id it is compared with; null for teachers and baselines")
    after: Name | None = Field(None, description="run id that the stage went on from (kind after)")
    teacher_run: Name | None = Field(
        None, description="run id of its teacher, where each seed has a teacher of its own"
    )
    evaluation: str | None = Field(
        None, description="identity of what it is scored on; state.json has the versions of those scores"
    )

    @field_validator("arm_settings")
    @classmethod
    def _for_people(cls, arm: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        for_people(words(arm or {}))
        return arm

    @model_validator(mode="after")
    def _consistent(self) -> PlanRun:
        if (self.student is None) != (self.kind == "teacher"):
            raise ValueError(f"run {self.run}: every run but a teacher's has a student setting")
        if self.kind == "student" and (self.arm_settings is None or self.baseline is None):
            raise ValueError(f"run {self.run}: a student run needs an arm and a baseline")
        if self.kind in {"teacher", "baseline"} and (self.arm_settings, self.baseline) != (None, None):
            raise ValueError(f"run {self.run}: a {self.kind} run has neither arm nor baseline")
        if (self.kind == "after") != (self.after is not None and self.stage is not None):
            raise ValueError(
                f"run {self.run}: stage and after belong to runs of kind after, and only to them"
            )
        if self.twin and (self.kind in {"teacher", "student"} or self.baseline is not None):
            raise ValueError(f"run {self.run}: only untaught runs have twins")
        return self


class Plan(Section):
    """What `plan.json` holds."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[3] = Field(SCHEMA, alias="schema", description="version of this file's format")
    name: Name
    title: Words = Field(description="heading of the report")
    seeds: tuple[int, ...] = Field(min_length=1, description="seeds of the student runs")
    students: tuple[PlanStudent, ...]
    teachers: tuple[PlanTeacher, ...]
    domains: tuple[PlanDomain, ...]
    in_domain: Name = Field(description="the domain that is the training distribution")
    corpus: Name | None = Field(None, description="name of the training text; null in older plans")
    runs: tuple[PlanRun, ...]
    claims: tuple[int, ...] = Field((), description="numbers of the pre-registered claims")
    notes: tuple[Words, ...] = Field((), description="remarks for the report")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        inside = [domain.name for domain in self.domains if domain.role == "in_domain"]
        if inside != [self.in_domain]:
            raise ValueError(f"in_domain is '{self.in_domain}' but the domains with that role are {inside}")
        if len(self.domains) == 1:
            raise ValueError("domains: at least one must have the role out_of_domain")
        for what, known in (("teacher", self.teachers), ("student", self.students)):
            names = {None, *(entry.name for entry in known)}
            used = {run.teacher if what == "teacher" else run.student for run in self.runs}
            if unknown := sorted(str(name) for name in used - names):
                raise ValueError(f"runs name {what}s that are not in '{what}s': {unknown}")
            _refuse_twice(what, [entry.name for entry in known])
        _refuse_twice("domain", [domain.name for domain in self.domains])
        _refuse_twice("run", [run.run for run in self.runs])
        cells = [(r.kind, r.student, r.teacher, r.arm, r.seed, r.stage, r.twin) for r in self.runs]
        _refuse_twice("cell", cells)
        known_runs = {run.run for run in self.runs} | {None}
        if lost := [run.run for run in self.runs if run.teacher_run not in known_runs]:
            raise ValueError(f"run {lost[0]}: its teacher's run is not among the runs")
        if lost := [run.run for run in self.runs if run.baseline not in known_runs]:
            raise ValueError(f"run {lost[0]}: its baseline is not among the runs")
        return self


def _refuse_twice(what: str, keys: Sequence[Hashable]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"the same {what} appears twice: {twice[0]}")


def load_plan(directory: Path) -> Plan:
    """Read `directory/plan.json`.

    Raises:
        UserError: the file is missing, is no JSON, is of another version, or a field is wrong.
    """
    path = directory / "plan.json"
    try:
        data = read_sealed(path)
    except UnreadableError as error:
        if not path.exists():
            check_visible(path)
            raise UserError(
                f"{directory}: no study is here, or its texts are not built yet (no plan.json); "
                f"`tutelage study run FILE.yaml --output {shlex.quote(str(directory))}` makes one"
            ) from None
        raise UserError(f"{path}: {error.reason}; {_REMEDY}") from None
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema = {data.get('schema')!r}: of another version, this one reads {SCHEMA}; {_REMEDY}"
        )
    try:
        return Plan.model_validate_json(json.dumps(data))
    except ValidationError:
        return validate(Plan, data, str(path))  # which says what is wrong, and where


def save_plan(directory: Path, plan: Plan) -> None:
    """Write `directory/plan.json`, which `load_plan` reads back."""
    write_sealed(directory / "plan.json", plan.model_dump(mode="json", by_alias=True))


def models_of(directory: Path) -> tuple[list[Path], int]:
    """Directories of the planned runs that have a model, in the plan's order; how many others there are.

    Raises:
        UserError: there is no valid `plan.json`, or no run of it is finished.
    """
    runs = [RunDirectory(directory / "runs" / planned.run) for planned in load_plan(directory).runs]
    found = [run.path for run in runs if run.is_done() and not run.lacks_weights()]
    if not found:
        raise UserError(
            f"{directory}: none of the study's {len(runs)} runs is finished and has its model here"
        )
    return found, len(runs) - len(found)


def corpus_of(directory: Path) -> Path | None:
    """The training text of a study, as its first untaught student has it; None where none is there.

    Raises:
        UserError: there is no valid `plan.json`.
    """
    untaught = (planned.run for planned in load_plan(directory).runs if planned.kind == "baseline")
    for run in (RunDirectory(directory / "runs" / run) for run in untaught):
        if run.is_done():
            config = run.config()
            return located(config.data.store, config, run.path)
    return None


def plan_of(expanded: ExpandedStudy, nodes: Sequence[Node]) -> Plan:
    """The plan of a study whose runs are known."""
    ids = {node.cell.name: node.id for node in nodes}
    runs = [_run(node.cell, ids, node.cost, evaluation_id(node.config)) for node in nodes]
    return _plan(expanded, runs)


def draft_of(expanded: ExpandedStudy) -> Plan:
    """The plan of a study of which nothing is built: cells stand for runs, the vocabulary is as asked for.

    Raises:
        UserError: a cell cannot be built.
    """
    drafts = check_cells(expanded)
    vocab_size = expanded.study.corpus.tokenizer.vocab_size
    names = {cell.name: cell.name for cell in expanded.cells}
    costs = [Cost.of(cell, drafts[cell.name], expanded.teachers, vocab_size) for cell in expanded.cells]
    return _plan(
        expanded, [_run(cell, names, cost) for cell, cost in zip(expanded.cells, costs, strict=True)]
    )


def _plan(expanded: ExpandedStudy, runs: Sequence[PlanRun]) -> Plan:
    """The plan of `runs`, one for each cell in their order."""
    study = expanded.study
    trained: dict[str | None, list[Planned]] = {}
    students: dict[str, PlanStudent] = {}
    for cell, run in zip(expanded.cells, runs, strict=True):
        if cell.kind == "teacher":
            trained.setdefault(cell.teacher, []).append((cell, run))
        if cell.kind == "baseline" and cell.student is not None:
            students[cell.student] = PlanStudent(
                name=cell.student, shape=cell.shape, tokens=run.tokens, parameters=run.parameters
            )
    outside = tuple(PlanDomain(name=name, role=spec.role) for name, spec in study.domains.items())
    return Plan(
        name=study.name,
        title=study.title,
        seeds=study.seeds,
        students=tuple(students.values()),
        teachers=tuple(
            _teacher(expanded, name, trained.get(expanded.trained_as.get(name), []))
            for name in expanded.teachers
        ),
        domains=(PlanDomain(name=study.in_domain, role="in_domain"), *outside),
        in_domain=study.in_domain,
        corpus=study.corpus.name,
        runs=tuple(runs),
        claims=study.claims,
        notes=study.notes,
    )


def _teacher(expanded: ExpandedStudy, name: str, trained: Sequence[Planned]) -> PlanTeacher:
    """A teacher; `trained` are its runs, one or one for each seed."""
    study, teachers = expanded.study, expanded.teachers
    spec, parts = teachers[name], [teachers[one] for one in single_names(name, teachers)]
    run = trained[0][1] if trained else None
    once = trained[0] if spec.seed is not None and trained else None
    return PlanTeacher(
        name=name,
        control=all(one.control is not None for one in parts),
        description=spec.description or ("" if spec.mean is None else f"mean of {', '.join(spec.mean)}"),
        of=tuple(expanded.trained_as.get(one, one) for one in spec.mean or ()),
        shape=spec.shape,
        tokens=None if run is None else run.tokens,
        parameters=None if run is None else run.parameters,
        run=None if once is None else once[1].run,
        data_seed=None if once is None else once[0].settings["data"]["seed"],
        corpus=None if spec.corpus is None else spec.corpus.name,
        targets=None if spec.cache is None else spec.cache.format.kind,
        texts=tuple(
            dict.fromkeys(
                text for one in parts if one.corpus is not None for text in _texts_of(study, one.corpus)
            )
        ),
        tested_alpha=spec.tested_alpha,
    )


def _texts_of(study: StudyConfig, corpus: StoreConfig) -> Iterator[str]:
    """Names of the scored texts that are among the sources of a teacher's own text, at any weight."""
    own = [source.model_copy(update={"weight": None}) for source in corpus.sources]
    for name, domain in study.domains.items():
        if domain.source.model_copy(update={"weight": None}) in own:
            yield name


def _run(cell: Cell, ids: Mapping[str, str], cost: Cost, evaluation: str | None = None) -> PlanRun:
    """The record of a cell, its name and those of others replaced by `ids`."""
    return PlanRun(
        **cell.labels(),
        run=ids[cell.name],
        tokens=cost.tokens,
        parameters=cost.parameters,
        flops=cost.total,
        baseline=None if cell.baseline is None else ids[cell.baseline],
        after=ids[cell.needs[0]] if cell.kind == "after" else None,
        teacher_run=None if cell.learned is None else ids[cell.learned],
        evaluation=evaluation,
    )
