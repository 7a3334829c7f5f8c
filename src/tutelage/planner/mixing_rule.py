"""Fit the gain of mixing as a surface over alpha and gap, and name the best alpha of a gap.

No public law covers alpha below 1, nor gains out of domain. So this is a fit to finished studies and to
nothing else: gain = alpha (c0 + c1 gap) + alpha^2 (c2 + c3 gap + c4 gap^2) percent, zero without a teacher.
What it is worth is said by leaving whole pairs out: their gains are predicted from the other pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import nnls
from scipy.special import stdtrit

from tutelage.planner.points import SIDES, GainSide, TaughtPoint
from tutelage.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FEWEST_PAIRS, FEWEST_POINTS = 3, 6
_SLACK = 0.1
"""Part of the fitted gaps by which a gap may lie beyond them."""
ALPHAS = tuple(round(step / 20, 2) for step in range(1, 21))
"""Alphas that are chosen from, beside the least and the most that were fitted."""


class Prediction(NamedTuple):
    """A predicted number with its 95% interval; None where it is not known."""

    mean: float
    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Whether a number lies inside of the interval; none does where it is not known."""
        return self.low is not None and self.high is not None and self.low < value < self.high


class GainSurface(Record, extra="forbid"):
    """Gains of one side by alpha and gap, in percent."""

    side: GainSide
    coefficients: tuple[float, float, float, float, float]
    variance: tuple[float, float] = Field(
        description="of a left-out pair's gains: a constant, and what grows with the square of alpha"
    )
    pairs: int = Field(description="left out one after the other")
    points: int
    error: float = Field(description="root mean square of left-out pairs, percentage points")
    residual: float = Field(description="the same of the fit to all")
    gaps: tuple[float, float] = Field(description="least and most")
    alphas: tuple[float, float] = Field(description="least and most")

    def predict(self, alpha: float, gap: float, unsure: float = 0.0) -> Prediction:
        """The gain of a pair that is not known, with the interval that holds 95% of such pairs' means.

        Args:
            alpha: 0 gains nothing, for sure.
            gap: of the pair.
            unsure: half of the interval of a gap that is not measured, which the gain's interval contains.
        """
        if alpha == 0:
            return Prediction(0.0, 0.0, 0.0)
        gaps = np.array([gap, gap - unsure, gap + unsure])
        mean, low, high = (_features(np.full(3, alpha), gaps) @ self.coefficients).tolist()
        spread = np.sqrt(self.variance[0] + self.variance[1] * alpha**2)
        half = float(np.hypot(stdtrit(self.pairs - 1, 0.975) * spread, (high - low) / 2))
        return Prediction(mean, mean - half, mean + half)

    def outside(self, gap: float) -> str | None:
        """Say how a teacher's gap to its student is outside of the fitted ones; None if it is inside."""
        low, high = self.gaps
        slack = _SLACK * (high - low)
        if low - slack <= gap <= high + slack:
            return None
        return (
            f"outside: a teacher at {np.exp(-gap):.3f} of the student's own loss; known: "
            f"{np.exp(-high):.3f} to {np.exp(-low):.3f}"
        )


def fit_surface(points: Sequence[TaughtPoint], side: GainSide) -> GainSurface | None:
    """Fit the gains of one side; None with fewer than three pairs or six points."""
    known = [point for point in points if side in point.gains]
    pairs = {point.hidden_with for point in known}
    if len(pairs) < FEWEST_PAIRS or len(known) < FEWEST_POINTS:
        return None
    alphas = np.array([point.alpha for point in known])
    gaps = np.array([point.gap for point in known])
    gains = np.array([point.gains[side] for point in known])
    features = _features(alphas, gaps)
    solved = _solved(features, gains).tolist()
    left_out = np.empty_like(gains)
    for pair in pairs:
        apart = np.array([point.hidden_with == pair for point in known])
        left_out[apart] = gains[apart] - features[apart] @ _solved(features[~apart], gains[~apart])
    variance, _ = nnls(np.stack([np.ones_like(alphas), alphas**2], axis=1), left_out**2)
    return GainSurface(
        side=side,
        coefficients=(solved[0], solved[1], solved[2], solved[3], solved[4]),
        variance=(float(variance[0]), float(variance[1])),
        pairs=len(pairs),
        points=len(known),
        error=float(np.sqrt(np.mean(left_out**2))),
        residual=float(np.sqrt(np.mean((gains - features @ solved) ** 2))),
        gaps=(float(gaps.min()), float(gaps.max())),
        alphas=(float(alphas.min()), float(alphas.max())),
    )


def fit_surfaces(points: Sequence[TaughtPoint]) -> dict[GainSide, GainSurface]:
    """The surface of every side that has points enough."""
    found = {side: fit_surface(points, side) for side in SIDES}
    return {side: surface for side, surface in found.items() if surface is not None}


def chosen_alpha(
    surface: GainSurface, gap: float, alphas: Sequence[float] | None = None
) -> tuple[float, float]:
    """The alpha with the largest predicted gain, and that gain; 0 if none is above 0.

    Alphas beyond the fitted ones are not chosen.
    """
    low, high = surface.alphas
    asked = (low, *ALPHAS, high) if alphas is None else alphas
    able = [(surface.predict(alpha, gap).mean, alpha) for alpha in asked if low <= alpha <= high]
    gain, alpha = max(able, default=(0.0, 0.0))
    return (alpha, gain) if gain > 0 else (0.0, 0.0)


def _features(alphas: NDArray[np.float64], gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([alphas, alphas * gaps, alphas**2, alphas**2 * gaps, (alphas * gaps) ** 2], axis=1)


def _solved(features: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(features, gains, rcond=None)[0], dtype=np.float64)
