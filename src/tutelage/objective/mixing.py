"""Alpha policies: the weight of the distillation loss over the run.

A policy is a pure function of the fraction of the run that is done, so it is the same on every rank
and after every resume without keeping any state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.config import Alpha, ConstantAlpha, PiecewiseAlpha


def constant(policy: ConstantAlpha, _progress: float) -> float:
    """The same alpha throughout, as in arXiv 2605.23857."""
    return policy.value


def piecewise(policy: PiecewiseAlpha, progress: float) -> float:
    """Linear between knots, flat before the first and after the last; ramps of arXiv 2410.16215."""
    fractions, alphas = zip(*policy.knots, strict=True)
    return float(np.interp(progress, fractions, alphas))


POLICIES: dict[str, Callable[..., float]] = {"constant": constant, "piecewise": piecewise}


def alpha_at(policy: Alpha, step: int, steps: int) -> float:
    """Alpha of 0-based optimizer step `step` of `steps`; the last step has progress 1."""
    progress = step / (steps - 1) if steps > 1 else 0.0
    return POLICIES[policy.policy](policy, progress)
