"""Tests of claims about which teacher helps which student: strength, size, budget, controls, compute."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.parts import Part
from tutelage.analysis.stats import exceeds
from tutelage.analysis.view import Series, mean_of, minus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.analysis.view import View

UNDERTRAINED = 0.25
"""A teacher with at most this part of the student's tokens is undertrained."""
SMALL, LARGE = 0.2, 0.8
"""Alphas up to the first are small, from the second on large."""
_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"
_SIDES: tuple[Side, Side] = (_INSIDE, _OUTSIDE)
_ENOUGH = {"line": 3, "curve": 4}
_SIGNIFICANT = 0.025


def weak_gains(view: View) -> list[Part]:
    """A weaker teacher at its best alpha, out of domain."""
    return [Part("gain out of domain, best alpha", _at_best(view, view.pairs("weak-to-strong")), "above 0")]


def weak_alone_hurts(view: View) -> list[Part]:
    """A weaker teacher at alpha 1, in domain."""
    cells = [v for pair in view.pairs("weak-to-strong") for v in view.constants(pair, lambda a: a == 1)]
    return [Part("gain in domain, alpha 1", mean_of(view.gain(cell, _INSIDE) for cell in cells), "below 0")]


def alpha_rises(view: View) -> list[Part]:
    """Slope of the best alpha on the teacher's strength."""
    slopes = []
    for pairs in _by_student(view, "line"):
        wide = [pair for pair in pairs if len(view.constants(pair)) >= _ENOUGH["line"]]
        kept = _common_alphas(view, wide)
        best = [view.best_alpha(view.constants(pair, kept)) for pair in wide]
        slopes.append(_fit(wide, best, 1) if len(wide) >= _ENOUGH["line"] else {})
    label = "rise of the best alpha per 10% fewer bits of the teacher"
    return [Part(label, mean_of(slopes), "above 0", unit="")]


def same_level(view: View) -> list[Part]:
    """A teacher of the student's own level at its best alpha."""
    pairs = view.pairs("same-level")
    return [
        Part("gain out of domain, best alpha", _at_best(view, pairs), "above 0"),
        Part("gain in domain, best alpha", _at_best(view, pairs, _INSIDE), "within"),
    ]


def undertrained(view: View) -> list[Part]:
    """Undertrained teachers at small and at large alphas, out of domain."""
    pairs = [
        pair
        for pair in view.pairs()
        if pair.teacher.tokens is not None and pair.teacher.tokens <= UNDERTRAINED * pair.student.tokens
    ]

    def mean(keep: Callable[[float], bool]) -> Series:
        cells = [cell for pair in pairs for cell in view.constants(pair, keep)]
        return mean_of(view.gain(cell, _OUTSIDE) for cell in cells)

    small, large = mean(lambda alpha: alpha <= SMALL), mean(lambda alpha: alpha >= LARGE)
    return [
        Part(f"gain out of domain, alpha at most {SMALL:g}", small, "above 0"),
        Part(f"gain out of domain, alpha from {LARGE:g}", large, "below 0"),
    ]


def saturates(view: View) -> list[Part]:
    """Curvature of the gain in the teacher's strength, and whether the strongest is the best."""
    curves, reversals = [], []
    for pairs in _by_student(view, "curve"):
        kept = _common_alphas(view, pairs)
        gains = [view.best(view.constants(pair, kept), _OUTSIDE) for pair in pairs]
        curves.append(_fit(pairs, gains, 2))
        ordered = sorted(pairs, key=_strength)
        top = view.constants(ordered[-1], kept)
        rest = [cell for pair in ordered[:-1] for cell in view.constants(pair, kept)]
        if top and rest:
            ahead = view.validation(rest) - view.validation(top)
            reversals.append((ahead, minus(view.best(rest, _OUTSIDE), view.best(top, _OUTSIDE))))
    largest = max(reversals, key=lambda pair: pair[0], default=(0.0, {}))[1]
    return [
        Part("curvature of the gain in the teacher's strength", mean_of(curves), "below 0", unit="%/(10%)²"),
        Part("gain of the best other teacher less that of the strongest", largest, "above 0"),
    ]


def outside_more(view: View) -> list[Part]:
    """Out-of-domain gain less in-domain gain, both in percent."""
    pairs = view.pairs()
    both = [minus(_at_best(view, [pair], _OUTSIDE), _at_best(view, [pair], _INSIDE)) for pair in pairs]
    return [Part("gain out of domain less gain in domain", mean_of(both), "above 0")]


def falls_with_tokens(view: View) -> list[Part]:
    """Slope of the gain on the student's tokens, same shape and teacher."""
    slope = _student_slope(view, lambda p: p.student.rung, lambda p: p.student.tokens)
    return [Part("gain per doubling of the student's tokens", slope, "below 0")]


def changes_with_size(view: View) -> list[Part]:
    """Slope of the gain on the student's parameters, same tokens and teacher."""
    slope = _student_slope(view, lambda p: str(p.student.tokens), lambda p: p.student.parameters)
    return [Part("gain per doubling of the student's parameters", slope, "not 0")]


def controls_give_less(view: View) -> list[Part]:
    """Mean real teacher less the best control, out of domain, each at its best alpha."""
    differences = []
    for student in view.plan.students:
        controls = [t.name for t in view.plan.teachers if t.control]
        cells = [cell for name in controls for cell in view.arms(student.name, name) if cell.constant]
        real = [pair for pair in view.pairs() if pair.student == student]
        if cells and real:
            differences.append(minus(_at_best(view, real), view.best(cells, _OUTSIDE)))
    return [Part("gain of real teachers less that of the best control", mean_of(differences), "above 0")]


def compute_matched(view: View) -> list[Part]:
    """Untaught students with the compute of a teacher in tokens, against the baseline."""
    cells = [cell for _, cell in _matched(view)]
    label = "gain {} of the untaught student with a teacher's compute"
    return [
        Part(
            label.format(side.replace("_", " ")), mean_of(view.gain(cell, side) for cell in cells), "above 0"
        )
        for side in _SIDES
    ]


def compute_matched_remark(view: View) -> str:
    """How many pairs still win at equal compute."""
    counts = []
    for side in _SIDES:
        leads = [minus(_at_best(view, [pair], side), view.gain(cell, side)) for pair, cell in _matched(view)]
        clear = [lead for lead in leads if len(lead) > 1 and exceeds([*lead.values()]).support < _SIGNIFICANT]
        ahead = [lead for lead in leads if lead and np.mean([*lead.values()]) > 0]
        counts.append(f"{len(ahead)} of {len(leads)} {side.replace('_', ' ')} ({len(clear)} clearly)")
    return f"Pairs whose best alpha beats the untaught student of equal compute: {', '.join(counts)}."


def identical_data(view: View) -> list[Part]:
    """Teachers that read the student's own batches: each seed has its own, those of one shape are one arm."""
    arms: dict[tuple[str, str | None, int | None], dict[float, list[Verdict]]] = {}
    for pair in view.all_pairs():
        teacher = pair.teacher
        if teacher.corpus is not None:
            continue
        for cell in view.constants(pair):
            if cell.alpha is not None and teacher.data_seed in view.gain(cell, _OUTSIDE):
                kind = pair.student.name, teacher.rung, teacher.tokens
                arms.setdefault(kind, {}).setdefault(cell.alpha, []).append(cell)
    gain = mean_of(view.best_of([*alphas.values()], _OUTSIDE) for alphas in arms.values())
    return [Part("gain out of domain, teacher of the student's own batches", gain, "above 0")]


def cross_corpus(view: View) -> list[Part]:
    """Teachers trained on another corpus."""
    pairs = [pair for pair in view.all_pairs() if pair.teacher.corpus is not None]
    return [Part("gain out of domain, teacher of another corpus", _at_best(view, pairs), "above 0")]


def _at_best(view: View, pairs: Iterable[PairFinding], side: Side = _OUTSIDE) -> Series:
    """Mean over pairs of the gain at the best constant alpha."""
    return mean_of(view.best(view.constants(pair), side) for pair in pairs)


def _matched(view: View) -> list[tuple[PairFinding, Verdict]]:
    """Pairs, each with the untaught student that has its compute."""
    return [
        (pair, cell)
        for pair in view.pairs()
        for cell in view.arms(pair.student.name, None)
        if cell.arm == f"compute of {pair.teacher.name}"
    ]


def _by_student(view: View, shape: str) -> list[list[PairFinding]]:
    """Measured pairs of every student that has enough of them."""
    measured = [pair for pair in view.pairs() if pair.relation is not None]
    groups = [[*pairs] for _, pairs in groupby(measured, key=lambda pair: pair.student.name)]
    return [pairs for pairs in groups if len(pairs) >= _ENOUGH[shape]]


def _strength(pair: PairFinding) -> float:
    """How many percent fewer bits per byte the teacher needs than the untaught student, in tens."""
    assert pair.bits_per_byte is not None and pair.student_bits is not None  # noqa: S101, PT018 - measured
    return 10 * (1 - pair.bits_per_byte / pair.student_bits)


def _common_alphas(view: View, pairs: Sequence[PairFinding]) -> Callable[[float], bool]:
    """Accepts the alphas that all pairs have: a teacher with more alphas has more chances to look good."""
    alphas = [{cell.alpha for cell in view.constants(pair)} for pair in pairs]
    common = set.intersection(*alphas) if alphas else set()
    return lambda alpha: alpha in common


def _fit(pairs: Sequence[PairFinding], values: Sequence[Series], degree: int) -> Series:
    """Highest coefficient of a polynomial in the teacher's strength, fitted to each seed by itself."""
    seeds = set.intersection(*(set(one) for one in values)) if values else set()
    strengths = [_strength(pair) for pair in pairs]
    if len(set(strengths)) <= degree:
        return {}
    return {
        seed: float(np.polyfit(strengths, [one[seed] for one in values], degree)[0]) for seed in sorted(seeds)
    }


def _student_slope(
    view: View, same: Callable[[PairFinding], str], size: Callable[[PairFinding], int]
) -> Series:
    """Slope of the out-of-domain gain on log2 of a size of the student, mean over groups of one teacher.

    Of several students of one size (other learning rates, say) the one with most alphas counts.
    """

    def group(pair: PairFinding) -> tuple[str, str]:
        return pair.teacher.name, same(pair)

    slopes = []
    for _, found in groupby(sorted(view.pairs(), key=group), key=group):
        richest = {size(pair): pair for pair in sorted(found, key=lambda pair: len(view.constants(pair)))}
        pairs = [*richest.values()]
        sizes = [math.log2(value) for value in richest]
        if len(sizes) > 1:
            kept = _common_alphas(view, pairs)
            gains = [view.best(view.constants(pair, kept), _OUTSIDE) for pair in pairs]
            seeds = set.intersection(*(set(gain) for gain in gains))
            slopes.append(
                {s: float(np.polyfit(sizes, [gain[s] for gain in gains], 1)[0]) for s in sorted(seeds)}
            )
    return mean_of(slopes)
