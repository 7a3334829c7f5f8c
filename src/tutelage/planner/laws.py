"""Scaling laws of the loss of a student, alone and distilled, with the ranges that they hold in.

The forms are those of the distillation scaling laws (arXiv 2502.08606), losses in nats per token. N counts
parameters without embeddings, D training tokens. The published coefficients of the distillation law do not
fit small students (root mean square error .043 over 354 measured points); `PUBLISHED_TAUGHT` was fitted
to these points anew (.009; .018 where the points were not fitted).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

from tutelage.config.alpha_config import AutoAlpha
from tutelage.files import short

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PAYS_BELOW = 0.975
"""Part of the untaught student's own loss that a teacher's must be below for pure distillation to pay.

It is right for 96 to 97% of the 354 measured points; of 88 teachers above the student's own loss none paid.
"""
BEST_TEACHER = (0.81, 0.87)
"""Losses of the best teachers for pure distillation, as parts of the student's own; it is shallow."""


@dataclass(frozen=True, slots=True)
class Range:
    """Where a law was fitted, and so where it says anything.

    Attributes:
        parameters: least and most, without embeddings.
        tokens: least and most, of training.
        source: text and models that it was fitted on, in a few words.
    """

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    source: str

    def outside(self, parameters: float, tokens: float) -> str | None:
        """Say what is outside of it; None if nothing is."""
        for value, (low, high), what in (
            (parameters, self.parameters, "parameters without embeddings"),
            (tokens, self.tokens, "tokens"),
        ):
            if not low <= value <= high:
                span = f"{short(low)} to {short(high)}" if low < high else f"{short(low)} alone"
                return f"outside: {short(value)} {what}; known: {span}, {self.source}"
        return None


@dataclass(frozen=True, slots=True)
class SupervisedLaw:
    """L(N, D) = irreducible + (A / N^a + B / D^b)^g.

    Attributes:
        irreducible: E, in nats.
        A: of parameters.
        a: its exponent.
        B: of tokens.
        b: its exponent.
        g: exponent of both together.
    """

    irreducible: float
    A: float
    a: float
    B: float
    b: float
    g: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
        """Predict the loss of models trained without a teacher, in the units that the law was fitted in."""
        scarce = _scarcity(self.A, self.a, self.B, self.b, parameters, tokens)
        return np.asarray(self.irreducible + np.exp(self.g * scarce))


@dataclass(frozen=True, slots=True)
class DistillationLaw:
    """L_S = L_T + L_T^-c0 (1 + (L_T / (L~ d1))^(1/f1))^-c1f1 (A' / N^a' + B' / D^b')^g', at alpha 1 alone.

    Attributes:
        c0: exponent of the teacher's loss.
        c1f1: product of c1 and f1, which fits determine better than c1.
        f1: sharpness of the passage.
        d1: place of the passage, as L_T / L~.
        A: of parameters.
        a: its exponent.
        B: of tokens.
        b: its exponent.
        g: exponent of both together.
    """

    c0: float
    c1f1: float
    f1: float
    d1: float
    A: float
    a: float
    B: float
    b: float
    g: float

    def loss(
        self, parameters: ArrayLike, tokens: ArrayLike, teacher: ArrayLike, alone: ArrayLike
    ) -> NDArray[np.float64]:
        """Predict the loss of students that learn from a teacher alone (alpha 1).

        Args:
            parameters: of the student, without embeddings.
            tokens: that it is trained on.
            teacher: loss of the teacher, on the same text.
            alone: loss of the same student without a teacher, L~.
        """
        teacher, alone = np.asarray(teacher, dtype=np.float64), np.asarray(alone, dtype=np.float64)
        passage = np.logaddexp(0.0, np.log(teacher / (alone * self.d1)) / self.f1)
        scarce = _scarcity(self.A, self.a, self.B, self.b, parameters, tokens)
        return np.asarray(
            teacher + np.exp(-self.c0 * np.log(teacher) - self.c1f1 * passage + self.g * scarce)
        )


def _scarcity(
    A: float,
    a: float,
    B: float,
    b: float,
    parameters: ArrayLike,
    tokens: ArrayLike,
) -> NDArray[np.float64]:
    """log(A / N^a + B / D^b)."""
    found: NDArray[np.float64] = np.logaddexp(log(A) - a * np.log(parameters), log(B) - b * np.log(tokens))
    return found


PUBLISHED = SupervisedLaw(irreducible=1.220, A=3355.0, a=0.408, B=18186.0, b=0.431, g=0.452)
OF_EXPONENTS = (0.4, 0.4, 0.7)
"""Standard deviations of the logarithms of a, b and g before anything is measured: as far apart as published
laws are (.34, .28 and 1 in arXiv 2203.15556; .408, .431 and .452 in arXiv 2502.08606)."""
PUBLISHED_TAUGHT = DistillationLaw(
    c0=2.3661,
    c1f1=303.63,
    f1=0.10121,
    d1=1.6398,
    A=512077.0,
    a=0.57616,
    B=611331.0,
    b=0.51648,
    g=0.49364,
)
PUBLISHED_RANGE = Range((143e6, 12.6e9), (3.7e9, 515e9), "English web text, arXiv 2502.08606")
PUBLISHED_TEACHERS = (1.89, 2.61)
"""Losses of the teachers that `PUBLISHED_TAUGHT` is checked on, in nats per token."""
PUBLISHED_ERROR = 0.018 / 2.4
"""Root mean square error of `PUBLISHED_TAUGHT` on points that were not fitted, as a part of their loss."""


def rule_alpha(gap: float) -> float:
    """The alpha of `alpha: auto` for a teacher at a gap, log(own loss / teacher's loss), to two digits."""
    return round(AutoAlpha(policy="auto").bounded(exp(gap), 1.0), 2)


def coefficients(law: SupervisedLaw | DistillationLaw) -> tuple[float, ...]:
    """The numbers of a law, in the order of its fields."""
    return astuple(law)
