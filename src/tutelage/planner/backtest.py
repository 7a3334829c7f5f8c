"""Judge the planner on finished studies: hide each pair, let it choose, compare with hindsight.

Hidden are all students of one size and budget with one teacher, whatever their other settings; and, since
pairs of one student share their untaught runs, once more with all teachers of that size and budget. What is
told of them is what is known before the first is trained: losses of the teacher and the untaught student.
Choices are the alphas that were run, and no teacher at all. Regret is the gain of the best of these in
hindsight minus that of the choice, percentage points of the test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from tutelage.errors import UserError
from tutelage.planner.mixing_rule import chosen_alpha, fit_surface
from tutelage.planner.points import SIDES, by_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tutelage.planner.points import GainSide, StudyPoints, TaughtPoint

    Pair = Sequence[TaughtPoint]
    PairName = tuple[str, str, str]
    Promises = Mapping[PairName, tuple[float, float]]
    """Alpha and gain that a fit without the pair names."""

_FEWEST_ALPHAS = 2
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Regret:
    """Regret of one way to choose.

    Attributes:
        side: whose gains it is of, and what it chooses by.
        question: the "alpha" of a given pair, that of a "new student" of whose size and budget no pair is
            known, or "teacher" and alpha of a given student.
        rule: how it chooses.
        mean: over what was hidden.
        worst: the largest.
        best: how often it chose the best in hindsight.
        n: pairs, or students.
    """

    side: GainSide
    question: str
    rule: str
    mean: float
    worst: float
    best: float
    n: int


def backtest(points: StudyPoints) -> list[Regret]:
    """Regret of every rule, on every side that was scored.

    Raises:
        UserError: too few pairs have alphas to choose from.
    """
    found: list[Regret] = []
    for side in SIDES:
        known = [point for point in points.taught if side in point.gains]
        pairs, promised = _promises(known, side, lambda point: point.hidden_with)
        found += _by_pair(pairs, side, promised, "alpha")
        found += _by_student(pairs, side, promised)
        pairs, promised = _promises(known, side, lambda point: (point.study, point.parameters, point.tokens))
        found += _by_pair(pairs, side, promised, "new student")
    if not found:
        raise UserError(
            f"{' and '.join(points.studies)}: nothing to hide: {len(points.pairs())} pairs, of which three "
            "besides a hidden one must be left, each with two constant alphas"
        )
    return found


def _promises(
    known: Sequence[TaughtPoint], side: GainSide, hidden: Callable[[TaughtPoint], object]
) -> tuple[dict[PairName, Pair], Promises]:
    """Pairs with alphas to choose from, and what a fit to those unlike them in `hidden` says."""
    pairs: dict[PairName, Pair] = {}
    promised: dict[PairName, tuple[float, float]] = {}
    for name, pair in by_pair(known).items():
        surface = fit_surface([one for one in known if hidden(one) != hidden(pair[0])], side)
        if surface is not None and len(pair) >= _FEWEST_ALPHAS:
            pairs[name] = pair
            promised[name] = chosen_alpha(surface, pair[0].gap, [point.alpha for point in pair])
    return pairs, promised


def _by_pair(
    pairs: Mapping[PairName, Pair], side: GainSide, promised: Promises, question: str
) -> list[Regret]:
    """Which alpha, of a given teacher and student."""
    best = [max(0.0, *(point.gains[side] for point in pair)) for pair in pairs.values()]
    choices = {
        "planner": [promised[name][0] for name in pairs],
        "always .5": [0.5] * len(pairs),
        "always 1": [1.0] * len(pairs),
        "no teacher": [0.0] * len(pairs),
    }
    return [
        _regret(
            side,
            question,
            rule,
            best,
            [gain_at(*one, side) for one in zip(pairs.values(), alphas, strict=True)],
        )
        for rule, alphas in choices.items()
        if pairs
    ]


def _by_student(pairs: Mapping[PairName, Pair], side: GainSide, promised: Promises) -> list[Regret]:
    """Which teacher and alpha, of a given student that has several teachers."""
    groups: dict[tuple[str, str], list[PairName]] = {}
    for name in pairs:
        groups.setdefault(name[:2], []).append(name)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return []
    best = [max(0.0, *(point.gains[side] for name in group for point in pairs[name])) for group in several]
    dearest = [max(group, key=lambda name: promised[name][1]) for group in several]
    strongest = [max(group, key=lambda name: pairs[name][0].gap) for group in several]
    choices = {
        "planner": [(name, promised[name][0]) for name in dearest],
        "strongest at .5": [(name, 0.5) for name in strongest],
        "strongest, planned alpha": [(name, promised[name][0]) for name in strongest],
        "no teacher": [(name, 0.0) for name in strongest],
    }
    return [
        _regret(side, "teacher", rule, best, [gain_at(pairs[name], alpha, side) for name, alpha in chosen])
        for rule, chosen in choices.items()
    ]


def gain_at(pair: Pair, alpha: float, side: GainSide) -> float:
    """The measured gain of a pair at the nearest alpha, the mean of two as near; 0 without teacher."""
    if alpha == 0:
        return 0.0
    near = min(abs(point.alpha - alpha) for point in pair)
    return fmean(point.gains[side] for point in pair if abs(point.alpha - alpha) <= near + _ROUNDING)


def _regret(
    side: GainSide, question: str, rule: str, best: Iterable[float], gains: Iterable[float]
) -> Regret:
    regrets = np.array([most - gain for most, gain in zip(best, gains, strict=True)])
    return Regret(
        side=side,
        question=question,
        rule=rule,
        mean=float(regrets.mean()),
        worst=float(regrets.max()),
        best=float((regrets < _ROUNDING).mean()),
        n=len(regrets),
    )
