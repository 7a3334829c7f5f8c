"""Tests of claims about which teacher helps which student: strength, size, budget."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.parts import Part
from tutelage.analysis.view import Choice, Members, Series, mean_of, minus, named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding
    from tutelage.analysis.view import View

UNDERTRAINED = 0.25
"""A teacher with at most this part of the student's tokens is undertrained."""
SMALL, LARGE = 0.2, 0.8
"""Alphas up to the first are small, from the second on large."""
LINE, CURVE = 3, 4
"""Teachers of one student that a slope and a bend need."""
_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"
_RELATIONS = {"weak-to-strong": "weaker", "same-level": "same-level", "strong-to-weak": "stronger"}


def weak_gains(view: View) -> list[Part]:
    """A weaker teacher at its best alpha, out of domain."""
    gains = at_best(view, view.pairs("weak-to-strong"), _OUTSIDE)
    return [Part("gain out of domain, best alpha", gains, "above 0")]


def weak_alone_hurts(view: View) -> list[Part]:
    """A weaker teacher at alpha 1, in domain."""
    gains = at_alphas(view, view.pairs("weak-to-strong"), lambda a: a == 1, _INSIDE)
    return [Part("gain in domain, alpha 1", gains, "below 0")]


def alpha_rises(view: View) -> list[Part]:
    """Interaction of alpha and strength: slope on the teacher's strength of gain(0.8) less gain(0.2)."""
    slopes: Members = {}
    for student, pairs in _by_student(view.pairs()):
        steps = [(_strength(pair), _step(view, pair)) for pair in pairs]
        known = [(place, step) for place, step in steps if step is not None]
        if len(known) >= LINE:
            places, values = zip(*known, strict=True)
            slopes[student] = _coefficient(_line(places), values)
    label = f"rise of gain({LARGE:g}) less gain({SMALL:g}), out of domain, per 10% fewer bits of the teacher"
    return [Part(label, slopes, "above 0")]


def _step(view: View, pair: PairFinding) -> Series | None:
    """Gain at the large alpha less that at the small one; None without both."""
    gains = {cell.alpha: view.gain(cell, _OUTSIDE) for cell in view.constants(pair)}
    return minus(gains[LARGE], gains[SMALL]) if {LARGE, SMALL} <= gains.keys() else None


def same_level(view: View) -> list[Part]:
    """A teacher of the student's own shape and tokens at its best alpha; in domain not inferior."""
    pairs = [pair for pair in view.pairs() if pair.nominal == "same-level"]
    return [
        Part("gain out of domain, best alpha", at_best(view, pairs, _OUTSIDE), "above 0"),
        Part("gain in domain, best alpha", at_best(view, pairs, _INSIDE), "not below"),
    ]


def undertrained(view: View) -> list[Part]:
    """Undertrained teachers at small and at large alphas, out of domain."""
    pairs = [
        pair
        for pair in view.pairs()
        if pair.teacher.tokens is not None and pair.teacher.tokens <= UNDERTRAINED * pair.student.tokens
    ]
    small = at_alphas(view, pairs, lambda alpha: alpha <= SMALL, _OUTSIDE)
    large = at_alphas(view, pairs, lambda alpha: alpha >= LARGE, _OUTSIDE)
    return [
        Part(f"gain out of domain, alpha at most {SMALL:g}", small, "above 0"),
        Part(f"gain out of domain, alpha from {LARGE:g}", large, "below 0"),
    ]


def saturates(view: View) -> list[Part]:
    """Whether the gain rises less beyond the middle teacher, and whether the strongest is the best.

    The saturating form is two straight lines that meet at the median of the teachers' strengths. Each teacher
    counts at its own best alpha.
    """
    bends: Members = {}
    reversals = []
    for student, pairs in _by_student(view.pairs()):
        if len(pairs) >= CURVE:
            gains = [view.best(view.constants(pair), _OUTSIDE) for pair in pairs]
            bends[student] = _coefficient(_bend([_strength(pair) for pair in pairs]), gains)
            reversals.append((student, *_reversal(view, pairs)))
    untested: frozenset[int] = view.choosing if len(reversals) > 1 else frozenset()
    known = [one for one in reversals if one[1] is not None] or reversals
    largest = max(known, key=lambda one: one[1] or 0.0, default=None)
    ahead = {} if largest is None else {largest[0]: Choice((), untested).tested(largest[2])}
    return [
        Part("rise of the gain per 10% fewer bits of the teacher, beyond the middle teacher less before it",
             bends, "below 0"),
        Part("gain of the best other teacher less that of the strongest", ahead, "above 0"),
    ]  # fmt: skip


def _reversal(view: View, pairs: Sequence[PairFinding]) -> tuple[float | None, Series]:
    """Lead of the best other teacher over the strongest: on validation text of choosing seeds, and tested."""
    ordered = sorted(pairs, key=_strength)
    top = view.choose(view.candidates(view.constants(ordered[-1])))
    rest = view.choose([one for pair in ordered[:-1] for one in view.candidates(view.constants(pair))])
    best, other = view.validation(top), view.validation(rest)
    lead = None if best is None or other is None else other - best
    return lead, minus(view.gain_of(rest, _OUTSIDE), view.gain_of(top, _OUTSIDE))


def outside_more(view: View) -> list[Part]:
    """Out-of-domain gain less in-domain gain, both in percent; one test for each relation that there is."""
    parts = []
    for relation, word in _RELATIONS.items():
        pairs = view.pairs(relation)
        outside, inside = (at_best(view, pairs, side) for side in (_OUTSIDE, _INSIDE))
        both = {name: minus(outside[name], inside[name]) for name in outside}
        parts.append(Part(f"gain out of domain less gain in domain, {word} teachers", both, "above 0"))
    found = [part for part in parts if part.members]
    return found or [Part("gain out of domain less gain in domain", {}, "above 0")]


def falls_with_tokens(view: View) -> list[Part]:
    """Slope of the gain on the student's tokens, same shape and teacher."""
    slopes = _student_slopes(view, lambda p: p.student.rung, lambda p: p.student.tokens)
    return [Part("gain per doubling of the student's tokens", slopes, "below 0")]


def changes_with_size(view: View) -> list[Part]:
    """Slope of the gain on the student's parameters, same tokens and teacher."""
    slopes = _student_slopes(view, lambda p: f"{p.student.tokens} tokens", lambda p: p.student.parameters)
    return [Part("gain per doubling of the student's parameters", slopes, "not 0")]


def at_best(view: View, pairs: Iterable[PairFinding], side: Side) -> Members:
    """Gain of each pair at its best constant alpha."""
    return {named(pair): view.best(view.constants(pair), side) for pair in pairs}


def at_alphas(view: View, pairs: Iterable[PairFinding], keep: Callable[[float], bool], side: Side) -> Members:
    """Gain of each pair that has such alphas, mean over them."""
    cells = {named(pair): view.constants(pair, keep) for pair in pairs}
    return {name: mean_of(view.gain(cell, side) for cell in own) for name, own in cells.items() if own}


def _by_student(pairs: Iterable[PairFinding]) -> list[tuple[str, list[PairFinding]]]:
    """Pairs whose teacher's strength is measured, by the student's name."""
    measured = [pair for pair in pairs if pair.relation is not None]
    return [(name, [*some]) for name, some in groupby(measured, key=lambda pair: pair.student.name)]


def _strength(pair: PairFinding) -> float:
    """How many percent fewer bits per byte the teacher needs than the untaught student, in tens."""
    assert pair.bits_per_byte is not None and pair.student_bits is not None  # noqa: S101, PT018 - measured
    return 10 * (1 - pair.bits_per_byte / pair.student_bits)


def _line(places: Sequence[float]) -> list[list[float]]:
    """Columns of a straight line; the last one is its slope's."""
    return [[1.0] * len(places), [*places]]


def _bend(places: Sequence[float]) -> list[list[float]]:
    """Columns of two lines that meet at the median place; the last one is what the slope changes by."""
    middle = median(places)
    return [*_line(places), [max(0.0, place - middle) for place in places]]


def _coefficient(columns: Sequence[Sequence[float]], values: Sequence[Series]) -> Series:
    """Last coefficient of a least-squares fit to each seed; empty where the columns do not tell it."""
    design = np.array(columns).T
    if np.linalg.matrix_rank(design) < len(columns):
        return {}
    weights = np.linalg.pinv(design)[-1]
    seeds = set.intersection(*(set(one) for one in values))
    return {seed: float(weights @ [one[seed] for one in values]) for seed in sorted(seeds)}


def _student_slopes(
    view: View, same: Callable[[PairFinding], str], size: Callable[[PairFinding], int]
) -> Members:
    """Slope of the out-of-domain gain on log2 of a size of the student, by teacher and what is the same.

    Of several students of one size (other learning rates, say) the one with most alphas counts. Alphas are
    those that all sizes have: a size with more of them would come nearer to its best.
    """

    def group(pair: PairFinding) -> tuple[str, str]:
        return pair.teacher.name, same(pair)

    slopes: Members = {}
    for key, found in groupby(sorted(view.pairs(), key=group), key=group):
        richest = {size(pair): pair for pair in sorted(found, key=lambda pair: len(view.constants(pair)))}
        shared = set.intersection(*({v.alpha for v in view.constants(pair)} for pair in richest.values()))
        if len(richest) > 1 and shared:
            own = [[v for v in view.constants(pair) if v.alpha in shared] for pair in richest.values()]
            gains = [view.best(cells, _OUTSIDE) for cells in own]
            slopes[", ".join(key)] = _coefficient(_line([math.log2(value) for value in richest]), gains)
    return slopes
