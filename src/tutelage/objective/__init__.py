"""The objective, usable on its own: `from tutelage.objective import Objective, chunked_objective`."""

from tutelage.objective.alpha import POLICIES, Policy, make_policy
from tutelage.objective.checks import NotFiniteError
from tutelage.objective.chunked import chunked_objective
from tutelage.objective.divergences import DIVERGENCES, Divergence
from tutelage.objective.gates import GATES, Gate, TokenStats, make_gate
from tutelage.objective.objective import Objective, reference_objective
from tutelage.objective.sparse import TopK, TopP

__all__ = [
    "DIVERGENCES",
    "GATES",
    "POLICIES",
    "Divergence",
    "Gate",
    "NotFiniteError",
    "Objective",
    "Policy",
    "TokenStats",
    "TopK",
    "TopP",
    "chunked_objective",
    "make_gate",
    "make_policy",
    "reference_objective",
]
