"""Fit scaling laws to measured losses: least squares in log space, Huber's loss, several starts.

How far a fit is off is said by leaving points out: each is predicted by a fit of others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import Field
from scipy.optimize import least_squares
from scipy.special import stdtrit

from tutelage.planner.laws import (
    OF_EXPONENTS,
    PUBLISHED,
    PUBLISHED_TAUGHT,
    DistillationLaw,
    SupervisedLaw,
    coefficients,
)
from tutelage.records import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    Build = Callable[[NDArray[np.float64]], "Law"]
    Predict = Callable[["Law", NDArray[np.intp]], NDArray[np.float64]]
    Unusual = Callable[[NDArray[np.float64]], NDArray[np.float64]]

Law = TypeVar("Law", SupervisedLaw, DistillationLaw)

_HUBER = (1e-2, 5e-3, 2.5e-3, 1.5e-3, 1e-3)
"""Residuals of log losses above the last count linearly, as in arXiv 2203.15556; the search comes there by
way of the others. At once it stops at a kink of the loss, up to 40% above the least where points lie 2% off.
"""
_SPARE = 2
"""Points more than coefficients that a fit takes."""
_STARTS = 6
_FARTHEST = 80.0
_CALLS, _STEPS = 600, 50
"""At most of a search; of one that begins at the fit of nearly the same points a quarter."""
_NOISE, _ROUNDS = 0.005, 4
"""Noise of log losses, at most that of seeds: by what a fit is off more the law is wrong, not its exponents
unusual. How often it is found anew from what the fit is off by."""
_MEDIAN = 0.6745
"""Of absolute normal numbers, as a part of their standard deviation; an outlier does not move it."""
_FOLDS = 16
"""Parts that many points are left out in; few are left out one by one."""


class LawFit(Record, extra="forbid"):
    """A fitted law, with how far it is off."""

    coefficients: tuple[float, ...] = Field(description="in the order of the law's fields")
    free: int = Field(description="how many of them were fitted; the others are the published ones")
    residuals: tuple[float, ...] = Field(description="measured over predicted minus 1, of each point")
    left_out: tuple[float, ...] = Field(
        min_length=2,
        description="the same with a fit of the other points, or of fifteen sixteenths of many",
    )

    @property
    def error(self) -> float:
        """Root mean square of `left_out`."""
        return float(np.sqrt(np.mean(np.square(self.left_out))))

    @property
    def half_width(self) -> float:
        """Half of the 95% interval of a prediction, as a part of it: Student's t of the points left out."""
        return float(stdtrit(len(self.left_out) - 1, 0.975)) * self.error


class SupervisedFit(LawFit):
    """A fit of the law of models without a teacher."""

    @property
    def law(self) -> SupervisedLaw:
        """The law itself."""
        return SupervisedLaw(*self.coefficients)


class DistillationFit(LawFit):
    """A fit of the law of students that learn from a teacher alone."""

    @property
    def law(self) -> DistillationLaw:
        """The law itself."""
        return DistillationLaw(*self.coefficients)


def fit_supervised(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> SupervisedFit | None:
    """Fit the law of models without a teacher: six coefficients, or E, A and B beside published exponents.

    The one that predicts left-out points better; None with fewer than five points. Where points say little of
    the six's exponents these are near the published ones: two budgets, or as many tokens a parameter
    everywhere, can be fitted by exponents that are absurd between and beside the points.

    Args:
        parameters: without embeddings, of each model; one entry per size and budget.
        tokens: that it was trained on.
        losses: measured, in any unit of the same kind.
    """
    n, d, measured = (np.asarray(values, dtype=np.float64) for values in (parameters, tokens, losses))
    least, middle = measured.min(), (np.exp(np.log(n).mean()), np.exp(np.log(d).mean()))

    def all_free(x: NDArray[np.float64]) -> SupervisedLaw:
        return SupervisedLaw(*_positive(x))

    def scaled(x: NDArray[np.float64]) -> SupervisedLaw:
        irreducible, A, B = _positive(x)
        return SupervisedLaw(irreducible, A, PUBLISHED.a, B, PUBLISHED.b, PUBLISHED.g)

    def start(part: float, a: float, b: float, g: float) -> SupervisedLaw:
        half = (max(measured.mean() - part * least, 1e-3 * least) / 2) ** (1 / g)
        return SupervisedLaw(part * least, half * middle[0] ** a, a, half * middle[1] ** b, b, g)

    parts, exponents = (0.2, 0.6, 0.9), ((0.3, 0.3, 0.5), (0.4, 0.45, 0.45), (0.5, 0.5, 1.0), (0.3, 0.6, 0.7))
    wide = [np.log(coefficients(start(part, *some))) for part in parts for some in exponents]
    narrow = [
        np.log(coefficients(start(part, PUBLISHED.a, PUBLISHED.b, PUBLISHED.g)))[[0, 1, 3]] for part in parts
    ]

    def predict(law: SupervisedLaw, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        return law.loss(n[chosen], d[chosen])

    def unusual(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - np.log(coefficients(PUBLISHED)))[[2, 4, 5]] / OF_EXPONENTS

    fits = [
        _fit(build, predict, starts, measured, far)
        for build, starts, far in ((all_free, wide, unusual), (scaled, narrow, None))
        if len(measured) >= len(starts[0]) + _SPARE
    ]
    best = min(fits, key=lambda fit: fit.error, default=None)
    return None if best is None else SupervisedFit(**best.model_dump())


def fit_distillation(
    parameters: ArrayLike, tokens: ArrayLike, teachers: ArrayLike, alone: ArrayLike, losses: ArrayLike
) -> DistillationFit | None:
    """Fit the law of students that learn from a teacher alone; None with fewer than eleven points.

    Args:
        parameters: without embeddings, of each student.
        tokens: that it was trained on.
        teachers: losses of their teachers.
        alone: losses of the same students without a teacher.
        losses: measured of the taught students.
    """
    n, d, taught, own, measured = (
        np.asarray(values, dtype=np.float64) for values in (parameters, tokens, teachers, alone, losses)
    )
    known = np.log(coefficients(PUBLISHED_TAUGHT))
    if len(measured) < len(known) + _SPARE:
        return None
    middle = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    random = np.random.default_rng(0)
    starts = []
    for trial in range(_STARTS):
        x = known + (0.0 if trial == 0 else 0.3) * random.standard_normal(len(known))
        if trial % 2:  # as scarce as the published points are, at the middle of these
            x[4] = x[5] + np.log(middle[0]) * np.exp(x[5])
            x[6] = x[7] + np.log(middle[1]) * np.exp(x[7])
        starts.append(x)

    def predict(law: DistillationLaw, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        return law.loss(n[chosen], d[chosen], taught[chosen], own[chosen])

    found = _fit(lambda x: DistillationLaw(*_positive(x)), predict, starts, measured)
    return DistillationFit(**found.model_dump())


def _positive(x: NDArray[np.float64]) -> list[float]:
    """Coefficients from their logarithms, which a search may lead anywhere."""
    found: list[float] = np.exp(np.clip(x, -_FARTHEST, _FARTHEST)).tolist()
    return found


def _fit(
    build: Build[Law],
    predict: Predict[Law],
    starts: Sequence[NDArray[np.float64]],
    measured: NDArray[np.float64],
    unusual: Unusual | None = None,
) -> LawFit:
    """The best of the fits from all starts; points are left out from there on.

    Args:
        build: a law from what is searched.
        predict: losses of some of the points.
        starts: of the search.
        measured: losses of the points.
        unusual: standard deviations by which what is searched is off what is usual. They count as so many of
            the noise of a point, so that they decide where the points say little.
    """
    noise = _NOISE

    def solved(
        start: NDArray[np.float64], chosen: NDArray[np.intp], part: int = 1
    ) -> tuple[float, NDArray[np.float64]]:
        def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
            with np.errstate(all="ignore"):
                found = np.log(predict(build(x), chosen) / measured[chosen])
            if unusual is not None:
                found = np.concatenate([found, noise * unusual(x)])
            return np.nan_to_num(found, nan=1e3, posinf=1e3, neginf=-1e3)

        # Squares first: far from the minimum Huber's loss is nearly linear and leads there slowly.
        found = least_squares(residuals, start, method="lm", max_nfev=_CALLS // part)
        for scale in _HUBER:
            found = least_squares(
                residuals, found.x, loss="huber", f_scale=scale, x_scale="jac", max_nfev=_STEPS // part
            )
        return float(found.cost), found.x

    everything = np.arange(len(measured))
    _, best = min((solved(start, everything) for start in starts), key=lambda one: one[0])
    for _ in range(0 if unusual is None else _ROUNDS):
        off = np.median(np.abs(np.log(predict(build(best), everything) / measured)))
        found = off / _MEDIAN * np.sqrt(len(measured) / (len(measured) - len(best)))
        noise = min(_NOISE, float(found))
        _, best = solved(best, everything)
    law = build(best)
    left_out = np.empty(len(measured))
    for fold in range(min(_FOLDS, len(measured))):
        apart = everything % _FOLDS == fold
        _, x = solved(best, everything[~apart], 4)
        left_out[apart] = measured[apart] / predict(build(x), everything[apart]) - 1
    residuals = measured / predict(law, everything) - 1
    return LawFit(
        coefficients=coefficients(law),
        free=len(best),
        residuals=tuple(map(float, residuals)),
        left_out=tuple(map(float, left_out)),
    )
