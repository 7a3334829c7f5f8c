"""The figures of a study: which there are, and in which order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tutelage.analysis.canvas import Figure, key_of
from tutelage.analysis.gain_plots import alpha_curves, domain_gains, heat_map, strength_curves, trade_off
from tutelage.analysis.run_plots import calibration, cost, learning_curves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results

_FEW_TEACHERS = 6
_FEW_ROWS = 24
_ENOUGH_FOR_A_CURVE = 3


def figures(results: Results, findings: Findings, students: Sequence[str]) -> dict[str | None, list[Figure]]:
    """Every figure that the finished runs allow, by student in the report's order; last, the study's own.

    Args:
        results: the study.
        findings: what was found.
        students: those to draw.
    """
    drawn: dict[str | None, list[Figure]] = {}
    for student in students:
        pairs = [pair for pair in findings.pairs if pair.student.name == student]
        verdicts = [v for v in findings.verdicts if v.student == student and v.stage is None]
        if verdicts:
            suffix = "" if len(results.plan.students) == 1 else f"-{_slug(student)}"
            drawn[student] = _of_student(results, findings, pairs, verdicts, suffix)
    drawn[None] = [cost(results)]
    return drawn


def _of_student(
    results: Results,
    findings: Findings,
    pairs: Sequence[PairFinding],
    verdicts: Sequence[Verdict],
    suffix: str,
) -> list[Figure]:
    constants = [v for v in verdicts if v.constant]
    best = [pair.best for pair in pairs if pair.best is not None]
    shown = verdicts if len(verdicts) <= _FEW_ROWS else best
    key = key_of(pairs)
    whole = key if all(v.teacher for v in verdicts) else key_of(pairs, with_baseline=True)
    drawn = []
    if constants:
        drawn.append(heat_map(constants, suffix))
    if constants and sum(not pair.teacher.control for pair in pairs) <= _FEW_TEACHERS:
        drawn.append(alpha_curves(constants, key, suffix))
    drawn.append(trade_off(verdicts, whole, suffix))
    if len([pair for pair in pairs if pair.best and pair.relation]) >= _ENOUGH_FOR_A_CURVE:
        drawn.append(strength_curves(pairs, suffix))
    if shown:
        drawn.append(domain_gains(findings, shown, suffix))
    if any(v.fitted for v in verdicts):
        drawn.append(calibration(results, findings, verdicts, whole, suffix))
    if results.curves.height:
        drawn += learning_curves(results, findings, pairs, suffix)
    return drawn


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
