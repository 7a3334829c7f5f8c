"""The plan of a study, `plan.json`: which runs there are to be, and what each of them stands for."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, model_validator

from tutelage.configio import validate
from tutelage.errors import UserError
from tutelage.files import write_json
from tutelage.settings import Fraction, Name, Section
from tutelage.types import Role

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

Kind = Literal["teacher", "baseline", "student"]


class PlanStudent(Section):
    """The student that every baseline and student run trains."""

    rung: str = Field(description="name of its shape")
    tokens: int = Field(ge=1, description="training tokens of each run")
    parameters: int = Field(ge=1, description="parameters, embeddings included")


class PlanTeacher(Section):
    """One teacher, or a control in a teacher's place."""

    name: Name = Field(description="name in tables and figures")
    control: bool = Field(description="true if it knows nothing of the context, like the unigram")
    description: str = Field(description="what it is, in a few words")


class PlanDomain(Section):
    """One scored text."""

    name: Name = Field(description="name in tables and figures")
    role: Role = Field(description="is this the training distribution?")


class PlanRun(Section):
    """One run: a teacher, a student without a teacher (baseline), or a student with one."""

    run: Name = Field(description="run id, the name of its directory")
    kind: Kind
    teacher: Name | None = Field(description="its own name, its teacher's (student), or null (baseline)")
    alpha: Fraction | None = Field(description="weight of the distillation loss; students only")
    seed: int = Field(description="seed of the run; a student is compared with the baseline of its seed")

    @model_validator(mode="after")
    def _consistent(self) -> PlanRun:
        if (self.teacher is None) != (self.kind == "baseline"):
            raise ValueError(f"run {self.run}: a {self.kind} run needs {_needs(self.kind)}")
        if self.kind == "student" and self.alpha is None:
            raise ValueError(f"run {self.run}: a student run needs an alpha")
        return self


def _needs(kind: Kind) -> str:
    return "teacher null" if kind == "baseline" else "the name of a teacher"


class Plan(Section):
    """What `plan.json` holds."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema", description="version of this file's format")
    name: Name
    title: str = Field(description="heading of the report")
    seeds: tuple[int, ...] = Field(min_length=1, description="seeds of the student runs")
    runs_directory: str = Field("runs", description="directory of the runs, from the study's directory")
    student: PlanStudent
    teachers: tuple[PlanTeacher, ...]
    domains: tuple[PlanDomain, ...]
    in_domain: Name = Field(description="the domain that is the training distribution")
    runs: tuple[PlanRun, ...]
    notes: tuple[str, ...] = Field((), description="remarks for the report")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        inside = [domain.name for domain in self.domains if domain.role == "in_domain"]
        if inside != [self.in_domain]:
            raise ValueError(f"in_domain is '{self.in_domain}' but the domains with that role are {inside}")
        if len(self.domains) == 1:
            raise ValueError("domains: at least one must have the role out_of_domain")
        known = {teacher.name for teacher in self.teachers}
        unknown = {run.teacher for run in self.runs if run.teacher is not None} - known
        if unknown:
            raise ValueError(f"runs name teachers that are not in 'teachers': {sorted(unknown)}")
        _refuse_twice("teacher", [teacher.name for teacher in self.teachers])
        _refuse_twice("domain", [domain.name for domain in self.domains])
        _refuse_twice("run", [run.run for run in self.runs])
        _refuse_twice("cell", [(r.kind, r.teacher, r.alpha, r.seed) for r in self.runs])
        return self


def _refuse_twice(what: str, keys: Sequence[Hashable]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"the same {what} appears twice: {twice[0]}")


def load_plan(directory: Path) -> Plan:
    """Read `directory/plan.json`.

    Raises:
        UserError: the file is missing, is no JSON, or a field is wrong.
    """
    path = directory / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the directory of a study") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return validate(Plan, data, str(path))


def save_plan(directory: Path, plan: Plan) -> None:
    """Write `directory/plan.json`, which `load_plan` reads back."""
    write_json(directory / "plan.json", plan.model_dump(mode="json", by_alias=True))
