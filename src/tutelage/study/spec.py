"""The study file: which teachers teach which student, how much, how often."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.data.config import Source, StoreConfig
from tutelage.settings import Budget, Fraction, Name, Section
from tutelage.types import Role


class TeacherSpec(Section):
    """A teacher of the study: a rung trained on a budget, or a control that knows no context."""

    description: str = Field(description="a few words for tables")
    rung: str | None = Field(None, description="shape of a trained teacher")
    tokens: Budget | None = Field(None, description="its training tokens")
    control: Literal["unigram", "uniform"] | None = Field(None, description="or: kind of control")
    alphas: tuple[Annotated[Fraction, Field(gt=0)], ...] = Field(
        (), description="default: those of the study"
    )

    @model_validator(mode="after")
    def _one(self) -> TeacherSpec:
        trained = self.rung is not None and self.tokens is not None
        if trained == (self.control is not None) or (self.rung is None) != (self.tokens is None):
            raise ValueError("give 'rung' and 'tokens', or 'control'")
        return self


class DomainSpec(Section):
    """A text outside the training distribution."""

    source: Source
    role: Role = "out_of_domain"


class StudentSpec(Section):
    """The student."""

    rung: str
    tokens: Budget


class StudyConfig(Section):
    """One student, several teachers, a grid of alphas and seeds; every run paired by seed."""

    name: Name
    title: str = Field(description="headline of the report")
    corpus: StoreConfig = Field(description="training text; its held-out part is the in-domain test")
    in_domain: Name = Field("in-domain", description="name of the held-out part in tables")
    domains: dict[str, DomainSpec] = Field(description="out-of-domain texts, by name")
    student: StudentSpec
    teachers: dict[str, TeacherSpec] = Field(min_length=1)
    teacher_seed: int = Field(42, ge=0, description="weights and data order of every teacher")
    alphas: tuple[Annotated[Fraction, Field(gt=0)], ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1, description="a seed sets student weights and data order")
    run: dict[str, Any] = Field({}, description="settings of every run, as in a run file")
    notes: tuple[str, ...] = Field((), description="what a reader of the report must know")
