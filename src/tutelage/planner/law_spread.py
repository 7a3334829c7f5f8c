"""Say how sure a fitted law of models without a teacher is, at a size and budget and between two budgets.

Where points were left out says how far the law is off among the points that there are. It says nothing of a
corner that they do not determine: of models with twenty tokens a parameter each, parameters and tokens could
change places in the law. So what the points leave open of the law is added, by linear propagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy.special import stdtrit

from tutelage.planner.laws import OF_EXPONENTS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from tutelage.planner.law_fits import SupervisedFit
    from tutelage.planner.laws import SupervisedLaw

_LEAST = 1e-12


@dataclass(frozen=True, eq=False, slots=True)
class LawSpread:
    """What is left open of a fitted law.

    Attributes:
        law: that was fitted.
        middle: of the points' parameters and tokens, geometric.
        half_width: of the 95% interval at a point that was left out, as a part of the loss.
        open_CC: covariance of what `slopes` are slopes of, times the square of Student's t.
    """

    law: SupervisedLaw
    middle: tuple[float, float]
    half_width: float
    open_CC: NDArray[np.float64]

    @classmethod
    def of(cls, fit: SupervisedFit, parameters: ArrayLike, tokens: ArrayLike) -> Self:
        """What the points of a fit, in the order of its residuals, leave open."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        middle = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
        free = len(n) - fit.free
        noise = float(np.sum(np.square(fit.residuals)) / free)
        slopes_PC = slopes(fit.law, middle, n, d)
        known_CC = slopes_PC.T @ slopes_PC + noise * np.diag([0.0, 0.0, 0.0, *np.power(OF_EXPONENTS, -2.0)])
        size_C = np.sqrt(np.maximum(np.diag(known_CC), np.finfo(np.float64).tiny))
        values_C, vectors_CC = np.linalg.eigh(known_CC / np.outer(size_C, size_C))
        scaled_CC = vectors_CC / size_C[:, None]
        open_CC = (scaled_CC / np.maximum(values_C, _LEAST * values_C[-1])) @ scaled_CC.T
        return cls(fit.law, middle, fit.half_width, noise * float(stdtrit(free, 0.975)) ** 2 * open_CC)

    def at(self, parameters: float, tokens: float) -> float:
        """Half of the 95% interval of a loss, as a part of it."""
        return float(np.hypot(self.half_width, self._open(self._slopes_at(parameters, tokens))))

    def between(self, parameters: float, tokens: float, longer: float) -> float:
        """Half of the 95% interval of the loss on more tokens over that on fewer, as a part of it."""
        return self._open(self._slopes_at(parameters, longer) - self._slopes_at(parameters, tokens))

    def _slopes_at(self, parameters: float, tokens: float) -> NDArray[np.float64]:
        slopes_1C = slopes(self.law, self.middle, np.array([parameters]), np.array([tokens]))
        return slopes_1C.ravel()

    def _open(self, slopes_C: NDArray[np.float64]) -> float:
        return float(np.sqrt(slopes_C @ self.open_CC @ slopes_C))


def slopes(
    law: SupervisedLaw, middle: tuple[float, float], n: NDArray[np.float64], d: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Slopes of the log losses by E, by the parts of parameters and tokens at the middle, by log a, b and g.

    By the parts themselves, not their logarithms: a part that a fit left at nothing may still be there.
    """
    of_n, of_d = law.A / middle[0] ** law.a, law.B / middle[1] ** law.b
    less_n, less_d = (middle[0] / n) ** law.a, (middle[1] / d) ** law.b
    scarce = of_n * less_n + of_d * less_d
    reducible = scarce**law.g
    steep = law.g * reducible / scarce
    columns = (
        np.ones_like(scarce),
        steep * less_n,
        steep * less_d,
        steep * of_n * less_n * law.a * np.log(middle[0] / n),
        steep * of_d * less_d * law.b * np.log(middle[1] / d),
        reducible * law.g * np.log(scarce),
    )
    slopes_PC: NDArray[np.float64] = np.stack(columns, axis=1) / (law.irreducible + reducible)[:, None]
    return slopes_PC
