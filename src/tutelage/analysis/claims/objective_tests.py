"""Tests of claims about how a teacher is used: objective, schedules, gates, calibration."""

from __future__ import annotations

from math import log2
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tutelage.analysis.claims.evidence import Members, Series, Test, cell_name, has_setting, minus, named
from tutelage.analysis.claims.teacher_tests import at_alphas
from tutelage.types import COPYING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tutelage.analysis.claims.evidence import GainsBySeed, Statement
    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict

_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"
UNSCALED = ("keep_full_ce", "keep_full_kd")
"""Values of `mixing` that are no convex mixture."""


def kd_first(arm: Mapping[str, Any]) -> bool:
    """Whether an arm is a schedule that begins with more teacher than it ends with."""
    schedule = arm.get("alpha")
    if not isinstance(schedule, dict):
        return False
    match schedule:
        case {"policy": "salt"}:
            return True
        case {"policy": "linear" | "cosine", "start": first, "end": last}:
            return bool(first > last)
        case {"policy": "two_phase", "first": first, "second": last}:
            return bool(first > last)
    return False


def by_skill(arm: Mapping[str, Any]) -> bool:
    """Whether an arm teaches only tokens on which the teacher is better than the student."""
    return has_setting(arm, "gate", "teacher_better")


def difficulty(study: GainsBySeed) -> list[Test]:
    """Gain by difficulty of tokens, from the token comparisons made of runs; a test per text.

    Difficulty is the entropy of a third model, an untaught student of another run: tokens sorted by the
    baseline's own entropy are sorted by its luck too, and any other model seems to gain on the hard ones.
    """
    found: dict[str, dict[int, Series]] = {}
    known = study.runs
    untaught = {run.run: run.student for run in study.plan.runs if run.kind == "baseline"}
    cells = {cell.cell: cell for cell in study.verdicts}
    for one in study.results.token_comparisons:
        if (one.student, one.baseline) in known and one.sorter not in {None, one.baseline}:
            cell, seed = known[one.student, one.baseline]
            if untaught.get(one.sorter or "") == cells[cell].student:
                # None where entropies are so alike that a fifth is empty.
                for contrast in one.of("gain", "student", "entropy contrast")["mean"]:
                    found.setdefault(one.text, {}).setdefault(cell, {})[seed] = contrast
    label = "gain on the hardest fifth of tokens less that on the easiest"
    if not found:
        return [Test(f"{label} (`tutelage eval tokens --sorter`)", {}, "above 0")]
    return [
        Test(
            f"{label}, {text}",
            {cell_name(cells[cell]): series for cell, series in own.items()},
            "above 0",
            unit="nats per token",
        )
        for text, own in sorted(found.items())
    ]


def temperatures_alike(study: GainsBySeed) -> list[Test]:
    """T of 0.5 and of 2 against 1, at alpha 1."""
    return [_changed(study, f"T {t:g}", ("temperature", t), "within") for t in (0.5, 2)]


def temperatures_worse(study: GainsBySeed) -> list[Test]:
    """T of 4, and hard labels, against T of 1, at alpha 1."""
    return [
        _changed(study, "T 4", ("temperature", 4), "below 0"),
        _changed(study, "hard labels", ("divergence", "hard_labels"), "below 0"),
    ]


def _changed(study: GainsBySeed, name: str, setting: tuple[str, object], statement: Statement) -> Test:
    changes = study.change(study.variants(*setting, alpha=1.0), _OUTSIDE)
    return Test(f"change of the gain, {name}", changes, statement)


def truncation(study: GainsBySeed) -> list[Test]:
    """Renormalised top-k, and sampled targets, against the whole distribution, at alpha 1."""
    cut = [
        pair for pair in study.variants("truncation", "top_k", "tail", alpha=1.0) if _renormalised(pair[0])
    ]
    sampled = [pair for pair in study.all_pairs() if (pair.teacher.targets or "").startswith("sample")]
    changes: Members = {}
    for pair in sampled:
        for full in study.pairs():
            if _same_but_targets(pair, full):
                ours, theirs = (at_alphas(study, [one], lambda a: a == 1, _INSIDE) for one in (pair, full))
                changes |= {f"{a} less {b}": minus(ours[a], theirs[b]) for a in ours for b in theirs}
    return [
        Test("change of the gain in domain, renormalised top-k", study.change(cut, _INSIDE), "below 0"),
        Test("change of the gain in domain, sampled targets", changes, "within"),
    ]


def _renormalised(cell: Verdict) -> bool:
    arm = cell.arm_settings
    return has_setting(arm, "truncation", "top_k") and has_setting(arm, "tail", "renormalise")


def _same_but_targets(pair: PairFinding, full: PairFinding) -> bool:
    one, other = pair.teacher, full.teacher
    same = (one.shape, one.tokens, one.corpus) == (other.shape, other.tokens, other.corpus)
    return pair.student == full.student and same and other.targets is None


def not_scale(study: GainsBySeed) -> list[Test]:
    """Unscaled mixtures against the convex mixture of the same proportions."""
    changes: Members = {}
    for cell in study.verdicts:
        mixing = cell.arm_settings.get("mixing")
        if cell.alpha is not None and cell.stage is None and mixing in UNSCALED:
            ce = mixing == "keep_full_ce"
            equal = cell.alpha / (1 + cell.alpha) if ce else 1 / (2 - cell.alpha)
            changes[cell_name(cell)] = minus(study.gain(cell, _OUTSIDE), _interpolated(study, cell, equal))
    return [Test("gain less that of the convex mixture of the same proportions", changes, "within")]


def _interpolated(study: GainsBySeed, cell: Verdict, alpha: float) -> Series:
    """Gain at a constant alpha between the two next to it that were run; at alpha 0 it is 0."""
    gains = {
        v.alpha: study.gain(v, _OUTSIDE)
        for v in study.arms(cell.student, cell.teacher)
        if v.constant and v.alpha is not None
    }
    above = [known for known in gains if known >= alpha]
    if not above:
        return {}
    high, low = min(above), max((known for known in gains if known < alpha), default=0.0)
    part = (alpha - low) / (high - low)
    below = gains.get(low, dict.fromkeys(gains[high], 0.0))
    return {
        seed: part * gain + (1 - part) * below[seed] for seed, gain in gains[high].items() if seed in below
    }


def early_teaching(study: GainsBySeed) -> list[Test]:
    """The best schedule that begins with the teacher minus the best constant alpha, weaker teachers."""
    difference = _arms_less_constants(study, study.pairs("weak-to-strong"), kd_first)
    return [
        Test("gain of the best KD-first schedule less that of the best constant", difference, "not below")
    ]


def gating(study: GainsBySeed) -> list[Test]:
    """The best arm gated by skill minus the best constant alpha."""
    difference = _arms_less_constants(study, study.pairs(), by_skill)
    return [Test("gain gated by skill less that of the best constant", difference, "not below")]


def _arms_less_constants(
    study: GainsBySeed, pairs: Iterable[PairFinding], wanted: Callable[[Mapping[str, Any]], bool]
) -> Members:
    differences: Members = {}
    for pair in pairs:
        arms = [v for v in study.arms(pair.student.name, pair.teacher.name) if wanted(v.arm_settings)]
        if arms:
            constant = study.best(study.constants(pair), _OUTSIDE)
            differences[named(pair)] = minus(study.best(arms, _OUTSIDE), constant)
    return differences


def copying(study: GainsBySeed) -> list[Test]:
    """Accuracy of copying in context at alpha 1 minus that of the baseline."""
    scores = study.scores("accuracy", COPYING)
    changes = _compared(scores, _pure(study), lambda own, base: 100 * (own - base))
    label = "accuracy of copying at alpha 1 less the baseline's (`tutelage eval probe`)"
    return [Test(label, changes, "below 0", unit="points")]


def reverse_kl(study: GainsBySeed) -> list[Test]:
    """Reverse against forward KL, in domain."""
    change = study.change(study.variants("divergence", "reverse_kl"), _INSIDE)
    return [Test("change of the gain in domain, reverse KL", change, "below 0")]


def calibration(study: GainsBySeed) -> list[Test]:
    """Calibration error in domain at alpha 1, of the whole distribution and of its renormalised top k.

    Errors are compared as logarithms of ratios: a ratio of two small positive numbers is far from normal. An
    error of exactly zero has no logarithm, and its seed no number.
    """
    cut = [v for v in study.verdicts if _renormalised(v) and v.alpha == 1 and v.stage is None]
    known = study.scores("ece", study.plan.in_domain)
    scores = {place: (own, bases) for place, (own, bases) in known.items() if min(own, *bases) > 0}
    whole, top = (
        _compared(scores, cells, lambda own, base: log2(own / base)) for cells in (_pure(study), cut)
    )
    more = {name: {seed: ratio - 1 for seed, ratio in own.items()} for name, own in top.items()}
    return [
        Test("doublings of the baseline's calibration error at alpha 1", whole, "within", 1.0, "log2"),
        Test("the same with top-k, less one", more, "above 0", unit="log2"),
    ]


def _pure(study: GainsBySeed) -> list[Verdict]:
    return [cell for pair in study.pairs() for cell in study.constants(pair, lambda a: a == 1)]


def _compared(
    scores: dict[tuple[int, int], tuple[float, list[float]]],
    cells: Iterable[Verdict],
    compared: Callable[[float, float], float],
) -> Members:
    """A comparison of the score of each cell that was scored with the baseline's, mean over its twins."""
    found: dict[int, Series] = {}
    for (cell, seed), (own, bases) in scores.items():
        found.setdefault(cell, {})[seed] = fmean(compared(own, base) for base in bases)
    return {cell_name(cell): found[cell.cell] for cell in cells if cell.cell in found}
