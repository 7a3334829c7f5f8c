"""Settings of alpha policies, the weight of the teacher at every step. No torch.

Policies that depend on the step alone are written here, as `at` of their section; those that follow the
training statistics are in `tutelage.objective.alpha`.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.base import Fraction, Inside, Section


class ConstantAlpha(Section):
    """The same alpha at every step, as in arXiv 2605.23857."""

    policy: Literal["constant"] = "constant"
    value: Fraction = Field(description="weight of the distillation loss; 1 - value weighs cross-entropy")

    def at(self, progress: float) -> float:
        """Return `value` at any progress."""
        del progress
        return self.value

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.value


class PiecewiseAlpha(Section):
    """Alpha interpolated linearly between knots, flat before the first and after the last."""

    policy: Literal["piecewise"]
    knots: tuple[tuple[Fraction, Fraction], ...] = Field(
        min_length=1, description="pairs [fraction of the run, alpha], fractions rising"
    )

    @field_validator("knots", mode="before")
    @classmethod
    def _tuples(cls, knots: object) -> object:
        """Take lists too: behind the shorthand for a number, pydantic no longer knows this was JSON."""
        if not isinstance(knots, list | tuple):
            return knots
        return tuple(tuple(knot) if isinstance(knot, list) else knot for knot in knots)

    @field_validator("knots")
    @classmethod
    def _rising(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(a[0] >= b[0] for a, b in pairwise(knots)):
            raise ValueError("fractions must rise from knot to knot")
        return knots

    def at(self, progress: float) -> float:
        """Interpolate between the knots beside `progress`."""
        import numpy as np  # noqa: PLC0415 - configs are read without it

        fractions, alphas = zip(*self.knots, strict=True)
        return float(np.interp(progress, fractions, alphas))

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(alpha for _, alpha in self.knots)


class _FromTo(Section):
    start: Fraction = Field(description="alpha at the first step")
    end: Fraction = Field(description="alpha at the last step")

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(self.start, self.end)


class LinearAlpha(_FromTo):
    """A straight line over the whole run.

    Falling, it is the linear decay of arXiv 2410.16215; rising, the curriculum of arXiv 2605.26246.
    """

    policy: Literal["linear"]

    def at(self, progress: float) -> float:
        """Return start + progress (end - start)."""
        return (1.0 - progress) * self.start + progress * self.end


class CosineAlpha(_FromTo):
    """Half a cosine over the whole run: a line with flat ends (shape of arXiv 1608.03983)."""

    policy: Literal["cosine"]

    def at(self, progress: float) -> float:
        """Weigh the start by (1 + cos(pi progress)) / 2 and the end by the rest."""
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return share * self.start + (1.0 - share) * self.end


class TwoPhaseAlpha(Section):
    """One alpha, then another.

    The controls .1 -> .3 and .3 -> .1 give the same amount of teaching in opposite orders: they test whether
    a gain over the constant of arXiv 2605.23857 comes from the order and not from the mean.
    """

    policy: Literal["two_phase"]
    first: Fraction = Field(description="alpha before the switch")
    second: Fraction = Field(description="alpha from the switch on")
    switch: Inside = Field(default=0.5, description="fraction of the run at which alpha changes")

    def at(self, progress: float) -> float:
        """Return `first` before the switch, `second` from there on."""
        return self.first if progress < self.switch else self.second

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(self.first, self.second)


class WsdAlpha(Section):
    """Alpha in proportion to a warm-up-stable-decay learning rate; needs optim.schedule = wsd.

    This did best in the design space of arXiv 2410.16215.
    """

    policy: Literal["wsd"]
    peak: Fraction = Field(description="alpha while the learning rate is at its peak")

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.peak


class SaltAlpha(Section):
    """Distillation first, then plain cross-entropy at its usual cost (SALT, arXiv 2410.18779)."""

    policy: Literal["salt"]
    value: Fraction = Field(description="alpha of the distillation stage")
    until: Inside = Field(description="fraction of the run at which the teacher is dropped")

    def at(self, progress: float) -> float:
        """Return `value` until the teacher is dropped, then 0."""
        return self.value if progress < self.until else 0.0

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.value


class _Bounded(Section):
    cap: Inside = Field(default=0.9, description="largest alpha")
    floor: Fraction = Field(default=0.1, description="smallest alpha")

    @model_validator(mode="after")
    def _ordered(self) -> _Bounded:
        if self.floor > self.cap:
            raise ValueError(f"floor ({self.floor}) must not be above cap ({self.cap})")
        return self

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.cap


class _ByGap(_Bounded):
    window: int = Field(
        default=20, ge=1, le=10**9, description="steps over which cross-entropies are averaged"
    )

    @abstractmethod
    def asked(self, ce: float, teacher_ce: float) -> float:
        """Alpha that mean cross-entropies of student and teacher in nats ask for, before its bounds."""

    def bounded(self, ce: float, teacher_ce: float) -> float:
        """The same within floor and cap."""
        return min(self.cap, max(self.floor, self.asked(ce, teacher_ce)))


class GapDrivenAlpha(_ByGap):
    """Alpha in proportion to the student's gap to the teacher."""

    policy: Literal["gap_driven"]
    scale: float = Field(
        default=0.5, ge=1e-6, le=1e6, description="gap in nats per token that asks for alpha 1"
    )

    def asked(self, ce: float, teacher_ce: float) -> float:
        """The gap over the scale."""
        return (ce - teacher_ce) / self.scale


class AutoAlpha(_ByGap):
    """Alpha by the relative gap to the teacher, with coefficients fitted on finished sweeps."""

    policy: Literal["auto"]
    level: Fraction = Field(default=0.4, description="alpha while the student is as good as the teacher")
    slope: float = Field(
        default=5.0, gt=0, le=1e6, description="rise of alpha per unit of the relative gap, CE_S / CE_T - 1"
    )
    cap: Fraction = Field(default=1.0, description="largest alpha")

    def asked(self, ce: float, teacher_ce: float) -> float:
        """A line over the relative gap."""
        return self.level + self.slope * (ce / max(teacher_ce, 1e-9) - 1.0)


class PrequentialAlpha(_Bounded):
    """Alpha from a bet between teacher and student, settled on label-only probe steps."""

    policy: Literal["prequential"]
    floor: Inside = Field(
        default=0.1, description="smallest alpha outside probes; above 0, or it could not recover"
    )
    period: int = Field(default=50, ge=3, le=10**9, description="steps from one probe to the next")
    probe: int = Field(
        default=5, ge=2, description="label-only steps (alpha 0) at the beginning of each period"
    )
    rate: float = Field(
        default=5.0, gt=0, le=1e6, description="change of the log-odds per nat and scored step"
    )

    @model_validator(mode="after")
    def _room_to_teach(self) -> PrequentialAlpha:
        if self.probe >= self.period:
            raise ValueError(f"probe ({self.probe}) must be shorter than period ({self.period})")
        return self


AlphaConfig = Annotated[
    ConstantAlpha
    | PiecewiseAlpha
    | LinearAlpha
    | CosineAlpha
    | TwoPhaseAlpha
    | WsdAlpha
    | SaltAlpha
    | GapDrivenAlpha
    | AutoAlpha
    | PrequentialAlpha,
    Field(discriminator="policy"),
]

_PLACES = 10_000


@functools.lru_cache(maxsize=1024)  # every student of a study asks
def taught_share(alpha: AlphaConfig, steps: int, lr_vanishes: bool) -> float:
    """Fraction of a run's steps on which the teacher is run; it is not where alpha is 0.

    Exact up to 10,000 steps; of longer runs so many are looked at.

    Args:
        alpha: of the run.
        steps: of the run.
        lr_vanishes: whether the learning rate of the last step is 0, as `OptimConfig.vanishes` says of wsd.
    """
    match alpha:
        case PrequentialAlpha():  # the first step of a probe is not scored
            return 1.0 - math.ceil(steps / alpha.period) / steps
        case WsdAlpha():
            return 1.0 - lr_vanishes / steps
        case GapDrivenAlpha() | AutoAlpha():
            return 1.0
    places = min(steps, _PLACES)
    return sum(alpha.at(place / max(1, places - 1)) > 0 for place in range(places)) / places
