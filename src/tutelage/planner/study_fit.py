"""Fit laws and a rule for alpha to finished studies, as a file; what a plan predicts by."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from tutelage.errors import UserError, in_words
from tutelage.planner.law_fits import DistillationFit, SupervisedFit, fit_distillation, fit_supervised
from tutelage.planner.law_spread import LawSpread
from tutelage.planner.laws import (
    PUBLISHED,
    PUBLISHED_ERROR,
    PUBLISHED_RANGE,
    PUBLISHED_TAUGHT,
    PUBLISHED_TEACHERS,
    DistillationLaw,
    Range,
    SupervisedLaw,
)
from tutelage.planner.mixing_rule import GainSurface, Prediction, fit_surfaces
from tutelage.planner.points import GainSide, StudyPoints
from tutelage.records import Record, UnreadableError, read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SCHEMA: Literal[1] = 1
_NORMAL = 1.96


class StudyFit(Record, extra="forbid"):
    """What `tutelage plan fit` writes."""

    schema_version: Literal[1] = _SCHEMA
    points: StudyPoints = Field(description="what was fitted")
    supervised: SupervisedFit | None = Field(description="law of models without a teacher; null: too few")
    distillation: DistillationFit | None = Field(description="law of pure distillation; null: too few")
    surfaces: dict[GainSide, GainSurface] = Field(description="gains by alpha and gap; empty: too few")

    @property
    def name(self) -> str:
        """The studies that it is of."""
        return " and ".join(self.points.studies)


def fit_points(points: StudyPoints) -> StudyFit:
    """Fit what can be fitted: laws of losses to those of one text, the rule for alpha to gains on any.

    Raises:
        UserError: there is nothing to fit.
    """
    settings = points.settings() if points.comparable else []
    pure = [point for point in points.taught if point.alpha == 1 and points.comparable]
    found = StudyFit(
        points=points,
        supervised=fit_supervised(*zip(*settings, strict=True)) if settings else None,
        distillation=fit_distillation(
            [point.parameters for point in pure],
            [point.tokens for point in pure],
            [point.teacher_loss for point in pure],
            [point.alone_loss for point in pure],
            [point.loss for point in pure],
        ),
        surfaces=fit_surfaces(points.taught),
    )
    if found.supervised is None and not found.surfaces:
        raise UserError(
            f"{found.name}: nothing can be fitted: {len(settings)} sizes and budgets of models without a "
            f"teacher (the law needs 5), {len(points.pairs())} pairs at {len(points.taught)} alphas (the "
            "rule for alpha needs 3 at 6); `tutelage study run bake-off` is the smallest that gives a rule"
        )
    return found


def save_fit(path: Path, fit: StudyFit) -> None:
    """Write a fit, which `load_fit` reads back."""
    write_sealed(path, fit.model_dump(mode="json"))


def load_fit(path: Path) -> StudyFit:
    """Read a fit.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return StudyFit.model_validate(read_sealed(path), strict=False)
    except UnreadableError as error:
        reason = error.reason
    except ValidationError as error:
        detail = error.errors()[0]
        reason = f"{'.'.join(map(str, detail['loc']))}: {in_words(detail)}"
    remedy = f"`tutelage plan fit STUDY --output {shlex.quote(path.name)}` writes one"
    raise UserError(f"{path}: no fit ({reason}); {remedy}")


@dataclass(frozen=True, slots=True)
class Basis:
    """What predictions are built on.

    Attributes:
        source: what it was fitted on, in a few words.
        range: of students and teachers.
        law: of models without a teacher; None without one.
        spread: how sure it is; None where that is not known.
        taught: law of pure distillation; None without one.
        taught_half_width: of its 95% interval, as a part of the loss.
        teachers: least and largest loss of the teachers that `taught` was fitted on.
        surfaces: gains of mixing by side; none where no study was fitted.
        measured: losses of models without a teacher, by parameters and tokens; they go before the law.
        stores: fingerprints of the token stores that all of this is of, as far as they are known.
    """

    source: str
    range: Range
    law: SupervisedLaw | None
    spread: LawSpread | None
    taught: DistillationLaw | None
    taught_half_width: float
    teachers: tuple[float, float]
    surfaces: Mapping[GainSide, GainSurface]
    measured: Mapping[tuple[float, float], float]
    stores: tuple[str, ...] = ()

    def alone(self, parameters: float, tokens: float) -> Prediction | None:
        """The loss of a model without a teacher; None where it was not measured and there is no law."""
        if (parameters, tokens) in self.measured:
            return Prediction(self.measured[parameters, tokens], None, None)
        if self.law is None:
            return None
        half_width = None if self.spread is None else self.spread.at(parameters, tokens)
        return interval(float(self.law.loss(parameters, tokens)), half_width)


def interval(mean: float, half_width: float | None) -> Prediction:
    """A prediction with an interval of `half_width` parts of it on each side; None: with none."""
    if half_width is None:
        return Prediction(mean, None, None)
    return Prediction(mean, mean * max(1 - half_width, 0.0), mean * (1 + half_width))


def published() -> Basis:
    """The laws of arXiv 2502.08606: no mixing, nothing out of domain, and no model below 143M parameters."""
    return Basis(
        source="published laws, arXiv 2502.08606",
        range=PUBLISHED_RANGE,
        law=PUBLISHED,
        spread=None,
        taught=PUBLISHED_TAUGHT,
        taught_half_width=_NORMAL * PUBLISHED_ERROR,
        teachers=PUBLISHED_TEACHERS,
        surfaces={},
        measured={},
    )


def basis_of(fit: StudyFit) -> Basis:
    """The laws and the rule that studies gave, in the range of their students and teachers."""
    points = fit.points
    settings = points.settings()
    number = max(len(points.texts), len(points.versions))
    texts = "one text" if number == 1 else f"{number} texts"
    pure = [point.teacher_loss for point in points.taught if point.alpha == 1] or [0.0]
    return Basis(
        source=f"fit to {fit.name}",
        range=Range(
            (min(n for n, _, _ in settings), max(n for n, _, _ in settings)),
            (min(d for _, d, _ in settings), max(d for _, d, _ in settings)),
            f"{texts} ({', '.join(points.texts)}) of {fit.name}",
        ),
        law=None if fit.supervised is None else fit.supervised.law,
        spread=None
        if fit.supervised is None
        else LawSpread.of(fit.supervised, [n for n, _, _ in settings], [d for _, d, _ in settings]),
        taught=None if fit.distillation is None else fit.distillation.law,
        taught_half_width=0.0 if fit.distillation is None else fit.distillation.half_width,
        teachers=(min(pure), max(pure)),
        surfaces=fit.surfaces,
        measured={(n, d): loss for n, d, loss in settings if points.comparable},
        stores=points.stores,
    )
