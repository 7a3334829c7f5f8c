"""Tests of claims about teachers: their strength, and smoothing, compute or data as other explanations."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.claims.evidence import (
    Choice,
    Members,
    Series,
    Test,
    has_setting,
    mean_of,
    minus,
    named,
)
from tutelage.analysis.stats import exceeds, holm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tutelage.analysis.claims.evidence import GainsBySeed
    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict

UNDERTRAINED = 0.25
"""A teacher with at most this part of the student's tokens is undertrained."""
SMALL, LARGE = 0.2, 0.8
"""Alphas up to the first are small, from the second on large."""
LINE, CURVE = 3, 4
"""Teachers of one student that a slope and a bend need."""
_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"
_RELATIONS = {"weak-to-strong": "weaker", "same-level": "same-level", "strong-to-weak": "stronger"}


def weak_gains(study: GainsBySeed) -> list[Test]:
    """A weaker teacher at its best alpha, out of domain."""
    gains = at_best(study, study.pairs("weak-to-strong"), _OUTSIDE)
    return [Test("gain out of domain, best alpha", gains, "above 0")]


def weak_alone_hurts(study: GainsBySeed) -> list[Test]:
    """A weaker teacher at alpha 1, in domain."""
    gains = at_alphas(study, study.pairs("weak-to-strong"), lambda a: a == 1, _INSIDE)
    return [Test("gain in domain, alpha 1", gains, "below 0")]


def alpha_rises(study: GainsBySeed) -> list[Test]:
    """Interaction of alpha and strength: slope on the teacher's strength of gain(0.8) minus gain(0.2)."""
    slopes: Members = {}
    for student, pairs in _by_student(study.pairs()):
        steps = [(_strength(pair), _step(study, pair)) for pair in pairs]
        known = [(place, step) for place, step in steps if step is not None]
        if len(known) >= LINE:
            places, values = zip(*known, strict=True)
            slopes[student] = _coefficient(_line(places), values)
    label = f"rise of gain({LARGE:g}) less gain({SMALL:g}), out of domain, per 10% fewer bits of the teacher"
    return [Test(label, slopes, "above 0")]


def _step(study: GainsBySeed, pair: PairFinding) -> Series | None:
    """Gain at the large alpha minus that at the small one; None without both."""
    gains = {cell.alpha: study.gain(cell, _OUTSIDE) for cell in study.constants(pair)}
    return minus(gains[LARGE], gains[SMALL]) if {LARGE, SMALL} <= gains.keys() else None


def same_level(study: GainsBySeed) -> list[Test]:
    """A teacher of the student's own shape and tokens at its best alpha; in domain not inferior."""
    pairs = [pair for pair in study.pairs() if pair.nominal == "same-level"]
    return [
        Test("gain out of domain, best alpha", at_best(study, pairs, _OUTSIDE), "above 0"),
        Test("gain in domain, best alpha", at_best(study, pairs, _INSIDE), "not below"),
    ]


def undertrained(study: GainsBySeed) -> list[Test]:
    """Undertrained teachers at small and at large alphas, out of domain."""
    pairs = [
        pair
        for pair in study.pairs()
        if pair.teacher.tokens is not None and pair.teacher.tokens <= UNDERTRAINED * pair.student.tokens
    ]
    small = at_alphas(study, pairs, lambda alpha: alpha <= SMALL, _OUTSIDE)
    large = at_alphas(study, pairs, lambda alpha: alpha >= LARGE, _OUTSIDE)
    return [
        Test(f"gain out of domain, alpha at most {SMALL:g}", small, "above 0"),
        Test(f"gain out of domain, alpha from {LARGE:g}", large, "below 0"),
    ]


def saturates(study: GainsBySeed) -> list[Test]:
    """Whether the gain rises less beyond the middle teacher, and whether the strongest is the best.

    The saturating form is two straight lines that meet at the median of the teachers' strengths. Each teacher
    counts at its own best alpha.
    """
    bends: Members = {}
    reversals = []
    for student, pairs in _by_student(study.pairs()):
        if len(pairs) >= CURVE:
            gains = [study.best(study.constants(pair), _OUTSIDE) for pair in pairs]
            bends[student] = _coefficient(_bend([_strength(pair) for pair in pairs]), gains)
            reversals.append((student, *_reversal(study, pairs)))
    untested: frozenset[int] = study.choosing if len(reversals) > 1 else frozenset()
    known = [one for one in reversals if one[1] is not None] or reversals
    largest = max(known, key=lambda one: one[1] or 0.0, default=None)
    ahead = {} if largest is None else {largest[0]: Choice((), untested).tested(largest[2])}
    return [
        Test("rise of the gain per 10% fewer bits of the teacher, beyond the middle teacher less before it",
             bends, "below 0"),
        Test("gain of the best other teacher less that of the strongest", ahead, "above 0"),
    ]  # fmt: skip


def _reversal(study: GainsBySeed, pairs: Sequence[PairFinding]) -> tuple[float | None, Series]:
    """Lead of the best other teacher over the strongest: on validation text of choosing seeds, and tested."""
    ordered = sorted(pairs, key=_strength)
    top = study.choose(study.candidates(study.constants(ordered[-1])))
    rest = study.choose([one for pair in ordered[:-1] for one in study.candidates(study.constants(pair))])
    best, other = study.validation(top), study.validation(rest)
    lead = None if best is None or other is None else other - best
    return lead, minus(study.gain_of(rest, _OUTSIDE), study.gain_of(top, _OUTSIDE))


def outside_more(study: GainsBySeed) -> list[Test]:
    """Out-of-domain gain minus in-domain gain, both in percent; one test for each relation that occurs."""
    parts = []
    for relation, word in _RELATIONS.items():
        pairs = study.pairs(relation)
        outside, inside = (at_best(study, pairs, side) for side in (_OUTSIDE, _INSIDE))
        both = {name: minus(outside[name], inside[name]) for name in outside}
        parts.append(Test(f"gain out of domain less gain in domain, {word} teachers", both, "above 0"))
    found = [part for part in parts if part.members]
    return found or [Test("gain out of domain less gain in domain", {}, "above 0")]


def falls_with_tokens(study: GainsBySeed) -> list[Test]:
    """Slope of the gain on the student's tokens, same shape and teacher."""
    slopes = _student_slopes(study, lambda p: p.student.shape, lambda p: p.student.tokens)
    return [Test("gain per doubling of the student's tokens", slopes, "below 0")]


def changes_with_size(study: GainsBySeed) -> list[Test]:
    """Slope of the gain on the student's parameters, same tokens and teacher."""
    slopes = _student_slopes(study, lambda p: f"{p.student.tokens} tokens", lambda p: p.student.parameters)
    return [Test("gain per doubling of the student's parameters", slopes, "not 0")]


def at_best(study: GainsBySeed, pairs: Iterable[PairFinding], side: Side) -> Members:
    """Gain of each pair at its best constant alpha."""
    return {named(pair): study.best(study.constants(pair), side) for pair in pairs}


def at_alphas(
    study: GainsBySeed, pairs: Iterable[PairFinding], keep: Callable[[float], bool], side: Side
) -> Members:
    """Gain of each pair that has such alphas, mean over them."""
    cells = {named(pair): study.constants(pair, keep) for pair in pairs}
    return {name: mean_of(study.gain(cell, side) for cell in own) for name, own in cells.items() if own}


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
    study: GainsBySeed, same: Callable[[PairFinding], str], size: Callable[[PairFinding], int]
) -> Members:
    """Slope of the out-of-domain gain on log2 of a size of the student, by teacher and what is the same.

    Of several students of one size (other learning rates, say) the one with most alphas counts. Alphas are
    those that all sizes have: a size with more of them would come nearer to its best.
    """

    def group(pair: PairFinding) -> tuple[str, str]:
        return pair.teacher.name, same(pair)

    slopes: Members = {}
    for key, found in groupby(sorted(study.pairs(), key=group), key=group):
        richest = {size(pair): pair for pair in sorted(found, key=lambda pair: len(study.constants(pair)))}
        shared = set.intersection(*({v.alpha for v in study.constants(pair)} for pair in richest.values()))
        if len(richest) > 1 and shared:
            own = [[v for v in study.constants(pair) if v.alpha in shared] for pair in richest.values()]
            gains = [study.best(cells, _OUTSIDE) for cells in own]
            slopes[", ".join(key)] = _coefficient(_line([math.log2(value) for value in richest]), gains)
    return slopes


_SIDES: tuple[Side, Side] = (_INSIDE, _OUTSIDE)
_CLEAR = 0.05


def controls_give_less(study: GainsBySeed) -> list[Test]:
    """Real teachers minus each control, out of domain, each at its best alpha.

    A teacher has to beat every control, so no control is chosen. The median over texts, and the mean over
    all texts but the one that adds most, stand beside the mean: one text can carry half of it.
    """
    parts = []
    for control in (teacher.name for teacher in study.plan.teachers if teacher.control):
        differences, texts = _less_control(study, control)
        if differences:
            label = f"gain of real teachers less that of the {control} control"
            parts.append(Test(label, differences, "above 0"))
            parts += _by_text(label, texts)
    return parts or [Test("gain of real teachers less that of a control", {}, "above 0")]


def _less_control(study: GainsBySeed, control: str) -> tuple[Members, dict[str, Members]]:
    """Differences from a control by pair: mean over texts, and text by text."""
    differences: Members = {}
    texts: dict[str, Members] = {}
    for pair in study.pairs():
        cells = [cell for cell in study.arms(pair.student.name, control) if cell.constant]
        if cells:
            real, smooth = (study.choose(study.candidates(some)) for some in (study.constants(pair), cells))
            differences[named(pair)] = minus(study.gain_of(real, _OUTSIDE), study.gain_of(smooth, _OUTSIDE))
            own, theirs = study.texts(real), study.texts(smooth)
            texts[named(pair)] = {text: minus(own[text], theirs[text]) for text in own if text in theirs}
    return differences, texts


def _by_text(label: str, texts: dict[str, Members]) -> list[Test]:
    """Parts beside a mean over texts: the median text, and the mean without the text that adds most."""
    names = sorted({text for members in texts.values() for text in members})
    means = {text: [*mean_of(members.get(text, {}) for members in texts.values()).values()] for text in names}
    if len(names) < 2 or not all(means.values()):  # noqa: PLR2004 - one text is its own median
        return []
    most = max(names, key=lambda text: fmean(means[text]))
    return [
        Test(f"{label}, median text", _over_texts(texts, names, median), "above 0", beside=True),
        Test(
            f"{label}, without {most}, the text that adds most",
            _over_texts(texts, [text for text in names if text != most], fmean),
            "above 0",
            beside=True,
        ),
    ]


def _over_texts(
    texts: dict[str, Members], names: Sequence[str], middle: Callable[[Sequence[float]], float]
) -> Members:
    """Middle over texts of each pair's numbers, seed by seed."""
    found: Members = {}
    for pair, members in texts.items():
        some = [members.get(text, {}) for text in names]
        seeds = set.intersection(*(set(one) for one in some))
        found[pair] = {seed: middle([one[seed] for one in some]) for seed in sorted(seeds)}
    return found


def compute_matched(study: GainsBySeed) -> list[Test]:
    """Taught students minus untaught ones that spent their teacher's forward passes on more tokens."""
    return [
        Test(f"gain {side.replace('_', ' ')}, taught less untaught of equal compute", leads, "below 0")
        for side, leads in ((side, _leads(study, side)) for side in _SIDES)
    ]


def compute_matched_remark(study: GainsBySeed) -> str:
    """How many pairs still win at equal compute."""
    leads = {side: _leads(study, side) for side in _SIDES}
    tests = [(side, [*lead.values()]) for side in _SIDES for lead in leads[side].values() if len(lead) > 1]
    p_values = holm([exceeds(values).p for _, values in tests])
    counts = []
    for side in _SIDES:
        ahead = [lead for lead in leads[side].values() if lead and np.mean([*lead.values()]) > 0]
        clear = [
            values
            for (of, values), p in zip(tests, p_values, strict=True)
            if of == side and p <= _CLEAR and np.mean(values) > 0
        ]
        counts.append(f"{len(ahead)} of {len(leads[side])} {side.replace('_', ' ')} ({len(clear)} clearly)")
    return (
        f"Pairs whose best alpha beats the untaught student of equal compute: {', '.join(counts)}; clearly: "
        "by Holm's correction over them."
    )


def _leads(study: GainsBySeed, side: Side) -> Members:
    return {
        named(pair): minus(study.best(study.constants(pair), side), study.gain(cell, side))
        for pair, cell in _matched(study)
    }


def _matched(study: GainsBySeed) -> list[tuple[PairFinding, Verdict]]:
    """Pairs, each with the untaught student that has its compute."""
    return [
        (pair, cell)
        for pair in study.pairs()
        for cell in study.arms(pair.student.name, None)
        if has_setting(cell.arm_settings, "compute_of", pair.teacher.name)
    ]


def identical_data(study: GainsBySeed) -> list[Test]:
    """Teachers that read the student's own batches: each seed has its own, those of one shape are one arm."""
    arms: dict[tuple[str, str | None, int | None], dict[float, list[Verdict]]] = {}
    for pair in study.all_pairs():
        teacher = pair.teacher
        if teacher.corpus is not None:
            continue
        for choice in study.candidates(study.constants(pair)):
            (cell,) = choice.cells
            if cell.alpha is not None and teacher.data_seed in study.gain(cell, _OUTSIDE):
                kind = pair.student.name, teacher.shape, teacher.tokens
                arms.setdefault(kind, {}).setdefault(cell.alpha, []).append(cell)
    gains: Members = {}
    for (student, shape, tokens), alphas in arms.items():
        choice = study.choose([Choice(tuple(cells)) for cells in alphas.values()])
        gains[f"{student} from {shape} on {tokens} tokens"] = study.gain_of(choice, _OUTSIDE)
    return [Test("gain out of domain, teacher of the student's own batches", gains, "above 0")]


def cross_corpus(study: GainsBySeed) -> list[Test]:
    """Teachers trained on another corpus, on texts that are not of it."""
    gains: Members = {}
    for pair in study.all_pairs():
        if pair.teacher.corpus is not None:
            texts = study.texts(study.choose(study.candidates(study.constants(pair))))
            others = [gain for text, gain in texts.items() if text not in pair.teacher.texts]
            gains[named(pair)] = mean_of(others)
    return [Test("gain out of domain, teacher of another corpus, on other texts", gains, "above 0")]


def after_tuning(study: GainsBySeed) -> list[Test]:
    """The best alpha among those that were tuned afterwards, minus the baseline after the same stage."""
    gains: Members = {}
    stages = sorted({cell.stage for cell in study.verdicts if cell.stage is not None})
    for pair in study.pairs():
        for stage in stages:
            after = {
                cell.arm: cell
                for cell in study.arms(pair.student.name, pair.teacher.name, stage)
                if cell.constant
            }
            before = [cell for cell in study.constants(pair) if cell.arm in after]
            if before:
                choice = study.choose(study.candidates(before))
                tuned = Choice(tuple(after[cell.arm] for cell in choice.cells), choice.untested)
                gains[f"{named(pair)}, then {stage}"] = study.gain_of(tuned, _OUTSIDE)
    return [Test("gain out of domain after post-training", gains, "above 0")]
