"""Print what `tutelage plan` advises, what `plan fit` fitted and what `plan backtest` found."""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tutelage.analysis.report.planner_tables import (
    SIDE_WORDS,
    backtest_tables,
    fit_lines,
    ranking_table,
    surface_table,
)
from tutelage.analysis.report.report_table import Column, ReportTable, TableCell
from tutelage.cli.bars import out
from tutelage.cli.stages import period
from tutelage.files import short, size_text
from tutelage.planner.ledger import SWEEP, cache_format
from tutelage.planner.points import SIDES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.planner.advice import Advice, Outlook, PlanRequest
    from tutelage.planner.backtest import Regret
    from tutelage.planner.ledger import Expense
    from tutelage.planner.mixing_rule import Prediction
    from tutelage.planner.points import StudyPoints
    from tutelage.planner.study_fit import StudyFit

    Files = Mapping[str, tuple[str, Mapping[str, Any]]]

_LABEL = 9


def print_advice(request: PlanRequest, advice: Advice, files: Files, output: Path | None) -> None:
    """Print a plan as a card: answer, predictions, costs, what to start."""
    student = f"{request.shape.name} on {short(request.tokens)} tokens"
    _line("student", f"{student}, {short(request.parameters)} parameters without embeddings")
    _line("alone", f"loss {_between(advice.alone)} nats per token, by: {request.basis.source}")
    _line("answer", advice.answer.upper())
    for text in advice.why:
        _line("", text)
    out.print()
    _print(_gain_table(advice), _caption(advice))
    _print(_cost_table(request, advice), _cost_caption(request))
    for outlook in advice.outlooks:
        _print_outlook(request, outlook)
    _print_files(files, output)


def _print(table: ReportTable, caption: str) -> None:
    """A table with what it means below, as wide as the terminal."""
    table.print_on(out, "")
    _line("", caption)
    out.print()


def _line(label: str, text: str) -> None:
    """A line of the card, folded where the terminal ends."""
    wrapped = textwrap.wrap(text, max(out.width - _LABEL, 20), break_on_hyphens=False, break_long_words=False)
    for place, part in enumerate(wrapped):
        out.print(f"{label if place == 0 else '':<{_LABEL}}{part}", soft_wrap=True, highlight=False)


def _between(prediction: Prediction | None) -> str:
    """`2.243`, `3.036 (2.805 to 3.267)`."""
    if prediction is None:
        return "unknown"
    ends = "" if prediction.low is None else f" ({prediction.low:.3f} to {prediction.high:.3f})"
    return f"{prediction.mean:.3f}{ends}"


def _gain(prediction: Prediction | None) -> str:
    """`+1.85 ± 3.35`: percent, with half of the interval."""
    if prediction is None:
        return "unknown"
    half = "" if prediction.low is None else f" ± {((prediction.high or 0.0) - prediction.low) / 2:.2f}"
    return f"{prediction.mean:+.2f}{half}"


def _gain_table(advice: Advice) -> ReportTable:
    sides = [side for side in SIDES if any(side in one.gains for one in advice.outlooks)]
    headings = ["teacher", "alpha", *(SIDE_WORDS[side] for side in sides), "longer"]
    rows: list[list[TableCell | str]] = []
    for one in advice.outlooks:
        gains = [_gain(one.gains.get(side)) for side in sides]
        longer = _gain(one.longer_gain)
        alpha = f"{one.predicted_alpha:g}" if one.gains else ""
        known = one.longer_known or one.longer_gain is None
        rows.append([one.teacher.name, alpha, *gains, longer if known else f"> {longer}"])
    return ReportTable("", tuple(Column(heading) for heading in headings), rows)


def _caption(advice: Advice) -> str:
    text = (
        "Percent less loss than the student alone on the same tokens, ± half of the 95% interval. Longer: "
        "what it gains alone with the compute of one such run, the teacher's training included."
    )
    if all("out_of_domain" not in one.gains for one in advice.outlooks):
        text += " Nothing fitted here speaks of other texts."
    return text


def _cost_table(request: PlanRequest, advice: Advice) -> ReportTable:
    priced = request.prices.price is not None
    headings = ["teacher", "runs", "FLOPs", "of the teacher", "time", *["price"] * priced, "disk"]

    def row(name: str, cost: Expense) -> list[TableCell | str]:
        taught = cost.teacher_training + cost.teacher_forward
        price = ["" if cost.price is None else f"{cost.price:,.2f}"] * priced
        disk = size_text(cost.cache_bytes) if cost.cache_bytes else ""
        return [
            name,
            cost.way,
            f"{cost.flops:.3g}",
            f"{taught / cost.flops:.0%}",
            period(cost.seconds),
            *price,
            disk,
        ]

    rows = [row("none", advice.alone_cost)]
    for one in advice.outlooks:
        rows += [row(one.teacher.name if i == 0 else "", cost) for i, cost in enumerate(one.costs)]
    return ReportTable("", tuple(Column(heading) for heading in headings), rows)


def _cost_caption(request: PlanRequest) -> str:
    hardware = request.prices.hardware
    text = f"Time on {hardware.devices} x {hardware.name} at {hardware.device.mfu:.0%} of their peak; "
    text += f"{len(SWEEP)} runs: a sweep of alpha. Of the teacher: its training, if it is to be trained, and "
    text += "its forward passes, once for all runs where targets are cached: over "
    if request.text_tokens is None:
        return text + "the tokens of one run, but a cache covers the whole text (--store)."
    return text + f"the {short(request.text_tokens)} tokens of the whole text."


def _print_outlook(request: PlanRequest, one: Outlook) -> None:
    """What there is to say of a teacher beside its numbers."""
    kept, size = cache_format(request.vocab_size, one.teacher.width)
    fields = ", ".join(f"{name} {value}" for name, value in kept.model_dump(exclude={"kind"}).items())
    how = "measured" if one.teacher.measured else "by the law"
    loss = "unknown" if one.teacher.loss is None else f"{_between(one.teacher.loss)}, {how}"
    _line("teacher", f"{one.teacher.name}: loss {loss}")
    if one.alpha_source:
        _line("", f"alpha {one.alpha:g}: {one.alpha_source}" if one.alpha else one.alpha_source)
    if one.break_even:
        _line("", f"beats the same compute alone {one.break_even}")
    for text in one.checks:
        _line("", text)
    kept_tokens = request.tokens if request.text_tokens is None else request.text_tokens
    # So many runs together read more tokens than the whole text has, for which the teacher runs once.
    first = kept_tokens // request.tokens + 1
    _line("", f"cache from run {first:,} on: {kept.kind} ({fields}), {size:.3g} bytes a token at most")


def _print_files(files: Files, output: Path | None) -> None:
    for name, (what, settings) in files.items():
        if output is not None:
            _line("start", f"tutelage train {shlex.quote(str(output / name))}  ({what})")
        else:
            budget = (
                f"{what}, {short(float(settings['tokens']))} tokens"
                if isinstance(settings["tokens"], int)
                else what
            )
            _line("file", f"{name}: {budget}")
    if output is None:
        _line("next", "--output DIR --store STORE writes these run files; `tutelage train` starts them")


def plain(request: PlanRequest, advice: Advice, files: Files) -> dict[str, Any]:
    """A plan as JSON data."""
    return {
        "student": request.shape.name,
        "tokens": request.tokens,
        "parameters": request.parameters,
        "basis": request.basis.source,
        "answer": advice.answer,
        "why": advice.why,
        "outside": advice.outside,
        "alone": None if advice.alone is None else advice.alone._asdict(),
        "hardware": f"{request.prices.hardware.name}x{request.prices.hardware.devices}",
        "alone_cost": asdict(advice.alone_cost),
        "teachers": [_plain_outlook(request, one) for one in advice.outlooks],
        "best": None if advice.best is None else advice.best.teacher.name,
        "files": {name: settings for name, (_, settings) in files.items()},
    }


def _plain_outlook(request: PlanRequest, one: Outlook) -> dict[str, Any]:
    kept, size = cache_format(request.vocab_size, one.teacher.width)
    loss = one.teacher.loss
    return {
        "teacher": one.teacher.name,
        "kind": one.teacher.kind,
        "loss": None if loss is None else loss._asdict(),
        "measured": one.teacher.measured,
        "outside": one.teacher.outside,
        "ratio": one.ratio,
        "alpha": one.alpha,
        "alpha_source": one.alpha_source,
        "predicted_alpha": one.predicted_alpha,
        "gains": {side: gain._asdict() for side, gain in one.gains.items()},
        "student_loss": None if one.loss is None else one.loss._asdict(),
        "checks": one.checks,
        "costs": [asdict(cost) | {"flops": cost.flops} for cost in one.costs],
        "longer_tokens": one.longer_tokens,
        "longer_gain": None if one.longer_gain is None else one.longer_gain.mean,
        "longer": None if one.longer_gain is None else one.longer_gain._asdict(),
        "longer_known": one.longer_known,
        "break_even": one.break_even,
        "cache": kept.model_dump(mode="json") | {"bytes_per_token": size},
    }


def print_fit(fit: StudyFit, studies: Sequence[JudgedStudy]) -> None:
    """Print the teachers of each study in order, then laws and rule with what they are off by."""
    for study in studies:
        _print(
            ranking_table(study),
            "Each at its best alpha, gains in percent, ± half of the 95% interval over seeds. Cost of a run "
            "and training of the teacher: as multiples of the untaught student's FLOPs; what made cached "
            "targets is in neither.",
        )
    for label, text in fit_lines(fit):
        _line(label, text)
    out.print()
    if fit.surfaces:
        _print(
            surface_table(fit),
            "Teacher / own: loss of the teacher over the untaught student's. Gain at the alpha that the rule "
            "names. Off: of pairs that were left out, percentage points.",
        )


def print_backtest(found: Sequence[Regret], points: StudyPoints) -> None:
    """Print the regret of each way to choose, and what the studies are too small for."""
    for table in backtest_tables(found):
        _print(table, "")
    _line("regret", "mean (worst): percentage points of gain below the best run in hindsight, test split")
    students = {point.pair[:2] for point in points.taught}
    seeds = sorted({point.seeds for point in points.taught})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    few = f"{len(points.pairs())} pairs of {len(students)} student settings, {count} seeds each"
    _line(
        "limits",
        f"{few}. Pairs share students, teachers and seeds, so they are fewer than they look; the best in "
        "hindsight is chosen by the noise of its runs too, so a regret within that noise is none. Other "
        "texts and sizes: not tried.",
    )
