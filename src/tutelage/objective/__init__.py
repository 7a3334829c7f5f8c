"""Training objective. For use on its own: `from tutelage.objective import Objective, chunked_objective`."""

from tutelage.config.objective_config import (
    Objective,
    RandomGate,
    StudentEntropyGate,
    TeacherAheadGate,
    TeacherBetterGate,
    TeacherCertaintyGate,
    TeacherConfidenceGate,
    TeacherEntropyGate,
    TopK,
    TopP,
)
from tutelage.objective.alpha import Policy, make_policy
from tutelage.objective.checks import NotFiniteError
from tutelage.objective.chunked import ObjectiveHead, chunked_objective
from tutelage.objective.divergences import DIVERGENCES, Divergence
from tutelage.objective.gates import GATES, Gate, TokenStats, make_gate
from tutelage.objective.products import weight_and_bias
from tutelage.objective.reference import reference_objective

__all__ = [
    "DIVERGENCES",
    "GATES",
    "Divergence",
    "Gate",
    "NotFiniteError",
    "Objective",
    "ObjectiveHead",
    "Policy",
    "RandomGate",
    "StudentEntropyGate",
    "TeacherAheadGate",
    "TeacherBetterGate",
    "TeacherCertaintyGate",
    "TeacherConfidenceGate",
    "TeacherEntropyGate",
    "TokenStats",
    "TopK",
    "TopP",
    "chunked_objective",
    "make_gate",
    "make_policy",
    "reference_objective",
    "weight_and_bias",
]
