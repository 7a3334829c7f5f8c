"""Tests of claims about what could explain a gain otherwise: smoothing, compute, the data that was read."""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.parts import Part
from tutelage.analysis.stats import exceeds, holm
from tutelage.analysis.view import Choice, Members, mean_of, minus, named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.analysis.view import View

_INSIDE: Side = "in_domain"
_OUTSIDE: Side = "out_of_domain"
_SIDES: tuple[Side, Side] = (_INSIDE, _OUTSIDE)
_CLEAR = 0.05


def controls_give_less(view: View) -> list[Part]:
    """Real teachers less each control, out of domain, each at its best alpha.

    A teacher has to beat every control, so there is none to choose. The median over texts, and the mean over
    all texts but the one that adds most, stand beside the mean: one text can carry half of it.
    """
    parts = []
    for control in (teacher.name for teacher in view.plan.teachers if teacher.control):
        differences, texts = _less_control(view, control)
        if differences:
            label = f"gain of real teachers less that of the {control} control"
            parts.append(Part(label, differences, "above 0"))
            parts += _by_text(label, texts)
    return parts or [Part("gain of real teachers less that of a control", {}, "above 0")]


def _less_control(view: View, control: str) -> tuple[Members, dict[str, Members]]:
    """Differences from a control by pair: mean over texts, and text by text."""
    differences: Members = {}
    texts: dict[str, Members] = {}
    for pair in view.pairs():
        cells = [cell for cell in view.arms(pair.student.name, control) if cell.constant]
        if cells:
            real, smooth = (view.choose(view.candidates(some)) for some in (view.constants(pair), cells))
            differences[named(pair)] = minus(view.gain_of(real, _OUTSIDE), view.gain_of(smooth, _OUTSIDE))
            own, theirs = view.texts(real), view.texts(smooth)
            texts[named(pair)] = {text: minus(own[text], theirs[text]) for text in own if text in theirs}
    return differences, texts


def _by_text(label: str, texts: dict[str, Members]) -> list[Part]:
    """Parts beside a mean over texts: the median text, and the mean without the text that adds most."""
    names = sorted({text for members in texts.values() for text in members})
    means = {text: [*mean_of(members.get(text, {}) for members in texts.values()).values()] for text in names}
    if len(names) < 2 or not all(means.values()):  # noqa: PLR2004 - one text is its own median
        return []
    most = max(names, key=lambda text: fmean(means[text]))
    return [
        Part(f"{label}, median text", _over_texts(texts, names, median), "above 0", beside=True),
        Part(
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


def compute_matched(view: View) -> list[Part]:
    """Taught students less untaught ones that spent their teacher's forward passes on more tokens."""
    return [
        Part(f"gain {side.replace('_', ' ')}, taught less untaught of equal compute", leads, "below 0")
        for side, leads in ((side, _leads(view, side)) for side in _SIDES)
    ]


def compute_matched_remark(view: View) -> str:
    """How many pairs still win at equal compute."""
    leads = {side: _leads(view, side) for side in _SIDES}
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


def _leads(view: View, side: Side) -> Members:
    return {
        named(pair): minus(view.best(view.constants(pair), side), view.gain(cell, side))
        for pair, cell in _matched(view)
    }


def _matched(view: View) -> list[tuple[PairFinding, Verdict]]:
    """Pairs, each with the untaught student that has its compute."""
    return [
        (pair, cell)
        for pair in view.pairs()
        for cell in view.arms(pair.student.name, None)
        if cell.arm == f"compute of {pair.teacher.name}"
    ]


def identical_data(view: View) -> list[Part]:
    """Teachers that read the student's own batches: each seed has its own, those of one shape are one arm."""
    arms: dict[tuple[str, str | None, int | None], dict[float, list[Verdict]]] = {}
    for pair in view.all_pairs():
        teacher = pair.teacher
        if teacher.corpus is not None:
            continue
        for choice in view.candidates(view.constants(pair)):
            (cell,) = choice.cells
            if cell.alpha is not None and teacher.data_seed in view.gain(cell, _OUTSIDE):
                kind = pair.student.name, teacher.rung, teacher.tokens
                arms.setdefault(kind, {}).setdefault(cell.alpha, []).append(cell)
    gains: Members = {}
    for (student, shape, tokens), alphas in arms.items():
        choice = view.choose([Choice(tuple(cells)) for cells in alphas.values()])
        gains[f"{student} from {shape} on {tokens} tokens"] = view.gain_of(choice, _OUTSIDE)
    return [Part("gain out of domain, teacher of the student's own batches", gains, "above 0")]


def cross_corpus(view: View) -> list[Part]:
    """Teachers trained on another corpus, on texts that are not of it."""
    gains: Members = {}
    for pair in view.all_pairs():
        if pair.teacher.corpus is not None:
            texts = view.texts(view.choose(view.candidates(view.constants(pair))))
            others = [gain for text, gain in texts.items() if text not in pair.teacher.texts]
            gains[named(pair)] = mean_of(others)
    return [Part("gain out of domain, teacher of another corpus, on other texts", gains, "above 0")]


def after_tuning(view: View) -> list[Part]:
    """The best alpha among those that were tuned afterwards, less the baseline after the same stage."""
    gains: Members = {}
    stages = sorted({cell.stage for cell in view.verdicts if cell.stage is not None})
    for pair in view.pairs():
        for stage in stages:
            after = {
                cell.arm: cell
                for cell in view.arms(pair.student.name, pair.teacher.name, stage)
                if cell.constant
            }
            before = [cell for cell in view.constants(pair) if cell.arm in after]
            if before:
                choice = view.choose(view.candidates(before))
                tuned = Choice(tuple(after[cell.arm] for cell in choice.cells), choice.untested)
                gains[f"{named(pair)}, then {stage}"] = view.gain_of(tuned, _OUTSIDE)
    return [Part("gain out of domain after post-training", gains, "above 0")]
