"""The objective, usable on its own: `from tutelage.objective import Objective, chunked_objective`."""

from tutelage.objective.chunked import chunked_objective
from tutelage.objective.divergences import DIVERGENCES, Divergence
from tutelage.objective.mixing import POLICIES, alpha_at
from tutelage.objective.objective import Objective, reference_objective

__all__ = [
    "DIVERGENCES",
    "POLICIES",
    "Divergence",
    "Objective",
    "alpha_at",
    "chunked_objective",
    "reference_objective",
]
