"""Alpha policies: the weight of the distillation loss over the run. One registry for all of them.

The schedules here are pure functions of the step; the policies that listen to the run are in
`tutelage.objective.adaptive`. Both give the same alpha on every rank and after every resume. A teacher is
run only where alpha is above 0 or a policy needs to hear it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from tutelage.objective.adaptive import GapDriven, Prequential
from tutelage.objectiveconfig import (
    ConstantAlpha,
    CosineAlpha,
    LinearAlpha,
    PiecewiseAlpha,
    SaltAlpha,
    TwoPhaseAlpha,
    WsdAlpha,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from tutelage.objectiveconfig import Alpha

Config = TypeVar("Config")


class Policy(Protocol):
    """One alpha policy of one run."""

    def alpha(self, step: int, steps: int) -> float:
        """Alpha in [0, 1] of 0-based optimizer step `step` of `steps`."""

    def needs_teacher(self, step: int) -> bool:
        """Whether `observe` needs the teacher's cross-entropy of `step`, whatever alpha is."""

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Take note of one step: global means per token, 0-d, still on the device."""

    def state(self) -> dict[str, float]:
        """Everything a resumed run needs. Waits for the device."""

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""


class Schedule(Generic[Config]):
    """A policy that looks at nothing but the fraction of the run that is done, and keeps no state."""

    def __init__(self, config: Config, lr_shape: Callable[[int, int], float]) -> None:
        self.config = config
        self.lr_shape = lr_shape

    def at(self, progress: float) -> float:
        """Alpha at `progress`, 0 at the first step and 1 at the last."""
        raise NotImplementedError

    def alpha(self, step: int, steps: int) -> float:
        """Alpha of 0-based optimizer step `step` of `steps`; a run of one step takes the first value."""
        return self.at(step / (steps - 1) if steps > 1 else 0.0)

    def needs_teacher(self, _step: int) -> bool:
        """Never: where alpha is 0 the teacher is not run."""
        return False

    def observe(self, step: int, ce: Tensor, teacher_ce: Tensor) -> None:
        """Look away."""

    def state(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """There is nothing to load."""


class Constant(Schedule[ConstantAlpha]):
    """The same alpha throughout, as in arXiv 2605.23857."""

    def at(self, _progress: float) -> float:
        """The value."""
        return self.config.value


class Piecewise(Schedule[PiecewiseAlpha]):
    """Linear between knots, flat before the first and after the last; any other shape can be drawn so."""

    def at(self, progress: float) -> float:
        """Interpolate."""
        fractions, alphas = zip(*self.config.knots, strict=True)
        return float(np.interp(progress, fractions, alphas))


class Linear(Schedule[LinearAlpha]):
    """A straight line from `start` to `end`; the falling one is the linear decay of arXiv 2410.16215.

    The rising one is the curriculum of arXiv 2605.26246.
    """

    def at(self, progress: float) -> float:
        """Between the two ends."""
        return (1.0 - progress) * self.config.start + progress * self.config.end


class Cosine(Schedule[CosineAlpha]):
    """Half a cosine from `start` to `end`: a `linear` with soft ends (shape of arXiv 1608.03983)."""

    def at(self, progress: float) -> float:
        """Between the two ends; (1 + cos(pi progress)) / 2 is the share of the start."""
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return share * self.config.start + (1.0 - share) * self.config.end


class TwoPhase(Schedule[TwoPhaseAlpha]):
    """`first` until the fraction `switch` of the run, `second` from there on.

    The controls .1 -> .3 and .3 -> .1 give the same amount of teaching in opposite orders: the check that a
    gain over the constant of arXiv 2605.23857 comes from the order and not from the mean.
    """

    def at(self, progress: float) -> float:
        """One of the two."""
        return self.config.first if progress < self.config.switch else self.config.second


class Wsd(Schedule[WsdAlpha]):
    """Alpha = peak lr / peak_lr: warm-up, stable, decay together with a WSD learning rate.

    WSD-shaped alpha with a WSD learning rate did best in the design space of arXiv 2410.16215.
    """

    def alpha(self, step: int, steps: int) -> float:
        """In proportion to the learning rate."""
        return self.config.peak * self.lr_shape(step, steps)


class Salt(Schedule[SaltAlpha]):
    """`value` until the fraction `until` of the run, then plain cross-entropy without a teacher.

    SALT (arXiv 2410.18779): a small teacher early on saves training time. From the switch on the run costs
    what a run without a teacher costs.
    """

    def at(self, progress: float) -> float:
        """The value, then 0."""
        return self.config.value if progress < self.config.until else 0.0


POLICIES: dict[str, Callable[[Any, Callable[[int, int], float]], Policy]] = {
    "constant": Constant,
    "piecewise": Piecewise,
    "linear": Linear,
    "cosine": Cosine,
    "two_phase": TwoPhase,
    "wsd": Wsd,
    "salt": Salt,
    "gap_driven": GapDriven,
    "prequential": Prequential,
}
"""Name in `objective.alpha.policy` -> class. Built from its settings and the learning rate's shape."""


def make_policy(alpha: Alpha, lr_shape: Callable[[int, int], float]) -> Policy:
    """Build the policy of `alpha`.

    Args:
        alpha: its settings.
        lr_shape: (step, steps) -> learning rate as a fraction of its peak, in [0, 1]; `wsd` follows it.
    """
    return POLICIES[alpha.policy](alpha, lr_shape)
