"""Describe the tables of claims: what a study says of each, and what its plan can decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.analysis import words
from tutelage.analysis.claims.noise import default_noise, measure_noise
from tutelage.analysis.claims.power import REPORTED_GAIN, power_of
from tutelage.analysis.report.report_table import Column, ReportTable, TableCell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import ClaimResult, JudgedStudy, TestResult
    from tutelage.analysis.claims.power import StudyPower
    from tutelage.analysis.gains import Fit

_FITS: dict[Fit, str] = {"raw": "raw", "temperature": "temperature fitted", "unigram": "calibration fitted"}
_KINDS = {
    "in_domain": ("in domain", "%"),
    "out_of_domain": ("out of domain", "%"),
    "fitted": ("out of domain, fitted", "%"),
    "after": ("after post-training", "%"),
    "calibration": ("calibration error", " doublings"),
}


def answer_table(outcomes: Sequence[ClaimResult]) -> ReportTable:
    """What a study says of each claim, in a row: of several tests the one that decides is shown."""
    columns = (
        Column("claim", style="row"),
        Column("statement", style="statement"),
        Column("answer", style="nowrap"),
        Column("effect", style="num"),
        Column("95% interval", style="nowrap"),
        Column("n", style="num"),
        Column("p", style="nowrap"),
    )
    rows: list[list[TableCell | str]] = []
    for outcome in outcomes:
        shown = _deciding(outcome)
        effect = None if shown is None else shown.effect
        rows.append(
            [
                str(outcome.number),
                TableCell(outcome.text, outcome.open if shown is None else _tested(outcome, shown)),
                TableCell(outcome.answer, effect=outcome.answer),
                "" if effect is None or shown is None else f"{_number(effect.mean)}{_unit(shown)}",
                "" if effect is None else f"{_number(effect.low)} to {_number(effect.high)}",
                "" if effect is None else str(effect.n),
                "" if outcome.adjusted is None else _p(outcome.adjusted),
            ]
        )
    return ReportTable("Announced claims", columns, rows)


def _deciding(outcome: ClaimResult) -> TestResult | None:
    """The test that contradicts a claim most, or else supports it least.

    None if one has no numbers, unless others contradict the claim without it.
    """
    tests = [one for one in outcome.tests if not one.test.beside]
    known = [one for one in tests if one.effect is not None]
    if outcome.answer == "contradicted":
        return min(known, key=lambda one: one.test.evidence().contradict)
    if not tests or len(known) < len(tests):
        return None
    return max(tests, key=lambda one: one.test.evidence().support)


def _tested(outcome: ClaimResult, shown: TestResult) -> str:
    """What the effect is of, and what the claim says of it."""
    fitted = "" if outcome.primary == "raw" else f", {_FITS[outcome.primary]}"
    return f"{shown.test.label}{fitted}: {shown.test.reads()}"


def _unit(result: TestResult) -> str:
    unit = result.test.unit
    return unit if unit in {"", "%"} else f" {unit}"


def claim_rows(outcomes: Sequence[ClaimResult]) -> list[dict[str, Any]]:
    """Claims with their answers, effects and what would decide them."""
    return [
        {
            "number": outcome.number,
            "text": outcome.text,
            "answer": outcome.answer,
            "p": "" if outcome.adjusted is None else _p(outcome.adjusted),
            "parts": [_test(tested) for tested in outcome.tests],
            "primary": _FITS[outcome.primary],
            "other": _FITS[outcome.other_fit],
            "other_parts": [_test(tested) for tested in outcome.other],
            "open": outcome.open,
            "remark": outcome.remark,
        }
        for outcome in outcomes
    ]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"  # noqa: PLR2004 - three digits are shown


def _test(result: TestResult) -> dict[str, Any]:
    test, effect = result.test, result.effect
    numbers = None
    if effect is not None:
        spread = f"{_number(effect.low)} to {_number(effect.high)}"
        numbers = f"{_number(effect.mean)}{_unit(result)} ({spread}; n = {effect.n})"
    label = f"{test.label} (beside)" if test.beside else test.label
    return {"label": label, "reads": test.reads(), "effect": numbers}


def _number(value: float) -> str:
    """Two decimals; never `-0.00`."""
    return f"{round(value, 2) + 0.0:+.2f}"


def power_table(power: StudyPower) -> ReportTable:
    """What a plan can decide, a row per test of each announced claim."""
    columns = ("claim", "tested seeds", "noise", "decides effects of", "test")
    rows: list[list[TableCell | str]] = []
    for claim in power.claims:
        rows += [
            [
                str(claim.number),
                str(test.n),
                "" if test.n == 1 else f"{test.deviation:.2g}{test.unit if test.unit == '%' else ''}",
                test.words,
                f"{test.label}: {test.reads}",
            ]
            for test in claim.tests
        ]
        if not claim.tests:
            rows.append([str(claim.number), "0", "", "never", claim.lacking])
    return ReportTable(f"What {power.study} can decide", tuple(map(Column, columns)), rows)


def found_power(study: JudgedStudy) -> list[str]:
    """What a study's plan could decide by the noise that it turned out to have; empty without claims."""
    if not study.announced:
        return []
    several = any(verdict.judged for verdict in study.findings.verdicts)
    noise = measure_noise(study) if several else default_noise()
    answer, *about = power_sentences(power_of(study.results.plan, noise))
    return ["By the noise of this study. " + answer, *about]


def power_sentences(power: StudyPower) -> list[str]:
    """Which claims the plan cannot decide, what its numbers mean, and the noise behind them."""
    sizes = f"{REPORTED_GAIN:g}% of the bits per byte, a calibration error doubled once more"
    if power.weak:
        some = "claim" if len(power.weak) == 1 else "claims"
        answer = (
            f"Effects as large as those reported ({sizes}; for a margin: none) would leave undecided: {some} "
            f"{words.join([str(number) for number in power.weak])}."
        )
    else:
        answer = f"Effects as large as those reported ({sizes}; for a margin: none) would decide every claim."
    parts = [
        f"{name} {below:.2g}{unit}" + (f" ({alone:.2g}{unit} at alpha 1)" if alone != below else "")
        for (name, unit), (below, alone) in ((_KINDS[kind], pair) for kind, pair in power.deviations.items())
    ]
    meaning = (
        "Each statement would be shown with a chance of 80% (all tests of a claim together) at the "
        f"strictest level that Holm's correction can ask for, {power.level:.2g}. Noise: standard deviation "
        "over seeds of the numbers that are tested."
    )
    source = (
        f"One gain of this plan deviates over seeds by {'; '.join(parts)}. Measured in the study "
        f"{power.noise.study} ({power.noise.seeds} seeds)."
    )
    return [answer, meaning, source]
