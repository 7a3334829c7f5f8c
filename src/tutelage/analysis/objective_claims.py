"""Tests of claims about how a teacher is used: objective, schedules, gates, calibration, what comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.parts import Part
from tutelage.analysis.view import Series, mean_of, minus, says
from tutelage.types import COPYING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.analysis.view import View

ECE_MARGIN = 0.01
"""Expected calibration errors that differ by less are about the same."""
_SEVERAL = 2.0
_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"


def kd_first(arm: str) -> bool:
    """Whether an arm is a schedule that begins with more teacher than it ends with."""
    words = arm.split(", ", maxsplit=1)[0].split()
    numbers = dict(zip(words[1::2], words[2::2], strict=False))
    first, last = {
        "linear": ("start", "end"),
        "cosine": ("start", "end"),
        "two_phase": ("first", "second"),
    }.get(words[0], ("", ""))
    if words[0] == "salt":
        return True
    return first in numbers and last in numbers and float(numbers[first]) > float(numbers[last])


def by_skill(arm: str) -> bool:
    """Whether an arm teaches only tokens on which the teacher is better than the student."""
    return says(arm, "teacher_better")


def difficulty(view: View) -> list[Part]:
    """Gain by difficulty of tokens, from the mechanism evaluations made of runs; a test per text."""
    found: dict[str, dict[int, Series]] = {}
    known = view.runs()
    for one in view.results.mechanisms:
        if (one.student, one.baseline) in known:
            cell, seed = known[one.student, one.baseline]
            contrast = one.of("gain", "student", "entropy contrast")["mean"].item()
            found.setdefault(one.text, {}).setdefault(cell, {})[seed] = contrast
    label = "gain on the hardest fifth of tokens less that on the easiest"
    if not found:
        return [Part(f"{label} (`tutelage eval --mechanism`)", {}, "above 0")]
    return [
        Part(f"{label}, {text}", mean_of(cells.values()), "above 0", unit="nats per token")
        for text, cells in sorted(found.items())
    ]


def temperatures(view: View) -> list[Part]:
    """T of 0.5 and 2 against 1, T of 4 and hard labels against 1, at alpha 1."""

    def change(phrase: str) -> Series:
        return view.change(view.variants(phrase, alpha=1.0), _OUTSIDE)

    return [
        Part("change of the gain, T 0.5", change("temperature 0.5"), "within"),
        Part("change of the gain, T 2", change("temperature 2"), "within"),
        Part("change of the gain, T 4", change("temperature 4"), "below 0"),
        Part("change of the gain, hard labels", change("divergence hard_labels"), "below 0"),
    ]


def truncation(view: View) -> list[Part]:
    """Renormalised top-k, and sampled targets, against the whole distribution, at alpha 1."""
    cut = view.variants("top_k", "tail", alpha=1.0)
    sampled = [pair for pair in view.all_pairs() if (pair.teacher.targets or "").startswith("sample")]
    changes = []
    for pair in sampled:
        for full in view.pairs():
            if _same_but_targets(pair, full):
                theirs, ours = (view.constants(one, lambda a: a == 1) for one in (full, pair))
                changes += [minus(view.gain(a, _INSIDE), view.gain(b, _INSIDE)) for a in ours for b in theirs]
    return [
        Part("change of the gain in domain, top-k", view.change(cut, _INSIDE), "below 0"),
        Part("change of the gain in domain, sampled targets", mean_of(changes), "within"),
    ]


def _same_but_targets(pair: PairFinding, full: PairFinding) -> bool:
    one, other = pair.teacher, full.teacher
    same = (one.rung, one.tokens, one.corpus) == (other.rung, other.tokens, other.corpus)
    return pair.student == full.student and same and other.targets is None


def not_scale(view: View) -> list[Part]:
    """Unscaled mixtures against the convex mixture of the same proportions."""
    changes = []
    for cell in view.verdicts:
        if cell.alpha is not None and says(cell.arm, "mixing"):
            ce = says(cell.arm, "mixing keep_full_ce")
            equal = cell.alpha / (1 + cell.alpha) if ce else 1 / (2 - cell.alpha)
            changes.append(minus(view.gain(cell, _OUTSIDE), _interpolated(view, cell, equal)))
    return [Part("gain less that of the convex mixture of the same proportions", mean_of(changes), "within")]


def _interpolated(view: View, cell: Verdict, alpha: float) -> Series:
    """Gain at a constant alpha between those that were run; at alpha 0 it is 0."""
    constants = [v for v in view.arms(cell.student, cell.teacher) if v.constant and v.alpha is not None]
    if not constants or max(v.alpha or 0.0 for v in constants) < alpha:
        return {}
    gains = [view.gain(v, _OUTSIDE) for v in constants]
    seeds = set.intersection(*(set(gain) for gain in gains))
    alphas = [0.0, *(v.alpha or 0.0 for v in constants)]
    return {s: float(np.interp(alpha, alphas, [0.0, *(gain[s] for gain in gains)])) for s in sorted(seeds)}


def early_teaching(view: View) -> list[Part]:
    """The best schedule that begins with the teacher less the best constant alpha, weak teachers."""
    difference = _arms_less_constants(view, view.pairs("weak-to-strong"), kd_first)
    return [
        Part("gain of the best KD-first schedule less that of the best constant", difference, "not below")
    ]


def gating(view: View) -> list[Part]:
    """The best arm gated by skill less the best constant alpha."""
    difference = _arms_less_constants(view, view.pairs(), by_skill)
    return [Part("gain gated by skill less that of the best constant", difference, "not below")]


def _arms_less_constants(view: View, pairs: Iterable[PairFinding], wanted: Callable[[str], bool]) -> Series:
    differences = []
    for pair in pairs:
        arms = [v for v in view.arms(pair.student.name, pair.teacher.name) if wanted(v.arm)]
        if arms:
            constant = view.best(view.constants(pair), _OUTSIDE)
            differences.append(minus(view.best(arms, _OUTSIDE), constant))
    return mean_of(differences)


def copying(view: View) -> list[Part]:
    """Accuracy of copying in context at alpha 1 less that of the baseline."""
    scores = view.scores("accuracy", COPYING)
    pure = [cell for pair in view.pairs() for cell in view.constants(pair, lambda a: a == 1)]
    changes = _scores(scores, pure, lambda own, base: 100 * (own - base))
    label = "accuracy of copying at alpha 1 less the baseline's (`tutelage eval --probes`)"
    return [Part(label, changes, "below 0", unit="points")]


def after_tuning(view: View) -> list[Part]:
    """The best alpha of pretraining, after the same post-training as the baseline."""
    gains = []
    for pair in view.pairs():
        if pair.best is not None:
            gains += [
                view.gain(cell, _OUTSIDE)
                for cell in view.verdicts
                if cell.stage is not None
                and (cell.student, cell.teacher, cell.arm)
                == (pair.student.name, pair.teacher.name, pair.best.arm)
            ]
    return [Part("gain out of domain after post-training", mean_of(gains), "above 0")]


def reverse_kl(view: View) -> list[Part]:
    """Reverse against forward KL, in domain."""
    change = view.change(view.variants("divergence reverse_kl"), _INSIDE)
    return [Part("change of the gain in domain, reverse KL", change, "below 0")]


def calibration(view: View) -> list[Part]:
    """Calibration error in domain at alpha 1: of the whole distribution, and of its top k."""
    scores = view.scores("ece", view.plan.in_domain)
    pure = [cell for pair in view.pairs() for cell in view.constants(pair, lambda a: a == 1)]
    cut = [cell for cell in view.verdicts if says(cell.arm, "top_k") and cell.alpha == 1]
    return [
        Part(
            "calibration error at alpha 1 less the baseline's",
            _scores(scores, pure, lambda own, base: own - base),
            "within",
            margin=ECE_MARGIN,
            unit="",
        ),
        Part(
            f"calibration error with top-k as a multiple of the baseline's, less {_SEVERAL:g}",
            _scores(scores, cut, lambda own, base: own / base - _SEVERAL),
            "above 0",
            unit="times",
        ),
    ]


def _scores(
    scores: dict[tuple[int, int], tuple[float, float]],
    cells: Iterable[Verdict],
    compared: Callable[[float, float], float],
) -> Series:
    """Mean over cells of a comparison with the baseline's score."""
    found = []
    for cell in cells:
        own = {seed: compared(*pair) for (number, seed), pair in scores.items() if number == cell.cell}
        found.append(own)
    return mean_of(found)
