"""The verdicts of a study for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tutelage.analysis import answer, words
from tutelage.analysis.outcomes import judge_claims
from tutelage.analysis.score_warnings import score_warnings
from tutelage.analysis.verdicts import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tutelage.analysis.outcomes import Outcome
    from tutelage.analysis.verdicts import Findings, Verdict
    from tutelage.study.results import Results

_MANY = 24
"""More verdicts than this would not be read: each pair's best is shown."""


def print_verdicts(results: Results, console: Console) -> None:
    """Print the verdicts, the claims that the study announced, and the headline answer.

    Raises:
        UserError: as `judge`.
    """
    findings = judge(results)
    outcomes = judge_claims(results, findings)
    headings, rows = verdict_table(findings)
    table = Table(
        title=Text(results.plan.title),
        caption=Text(table_caption(findings)),
        box=None,
        caption_justify="left",
    )
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for paragraph in answer.headline(findings, outcomes):
        console.print(Text(paragraph))
    _print_claims(outcomes, console)
    for warning in score_warnings(results.scores.iter_rows(named=True)):
        console.print(Text(f"warning: {warning}"))
    for problem in results.problems:
        console.print(Text(f"left out: {problem}"))
    for warning in results.warnings:
        console.print(Text(f"warning: {warning}"))
    if results.unfinished.height:
        console.print(f"{results.unfinished.height} of {results.runs.height} planned runs are not done")


def verdict_table(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of verdicts: every arm, or of many the best of each pair."""
    shown = _shown(findings)
    several, fitted = len({v.student for v in shown}) > 1, any(v.fitted is not None for v in shown)
    headings = [
        "teacher",
        "measured",
        "alpha",
        "in domain",
        "out of domain",
        *["fitted"] * fitted,
        "in words",
    ]
    rows = []
    for v in shown:
        name = f"{v.teacher} control" if v.control and v.teacher else v.teacher or words.NO_TEACHER
        row = [name, "" if v.control else words.level(v), words.arm(v)]
        row += [words.plus_minus(v.in_domain), words.plus_minus(v.out_of_domain)]
        row += ["" if v.fitted is None else words.plus_minus(v.fitted)] * fitted
        rows.append([v.student] * several + [*row, words.verdict(v)])
    return ["student"] * several + headings, rows


def table_caption(findings: Findings) -> str:
    """What the numbers of the table are."""
    shown = _shown(findings)
    kinds = "; ".join(sorted({words.interval_name(v) for v in shown}))
    caption = (
        f"{words.GAIN_CAPTION} Measured: the teacher's own bits per byte in domain beside those of the "
        f"student alone. Intervals: {kinds}."
    )
    if len(shown) < len(findings.verdicts):
        caption += f" Best alpha of each pair; all {len(findings.verdicts)} rows are in the report."
    return caption


def markdown(findings: Findings) -> str:
    """The table of verdicts and its caption as Markdown, as the README shows them."""
    headings, rows = verdict_table(findings)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [" | ".join(cells) for cells in (headings, ["---"] * len(headings), *escaped)]
    return "".join(f"| {line} |\n" for line in lines) + f"\n{table_caption(findings)}\n"


def _shown(findings: Findings) -> list[Verdict]:
    if len(findings.verdicts) <= _MANY:
        return [*findings.verdicts]
    return [pair.best for pair in findings.pairs if pair.best is not None]


def _print_claims(outcomes: Sequence[Outcome], console: Console) -> None:
    announced = [outcome for outcome in outcomes if outcome.announced]
    if not announced:
        return
    table = Table(box=None, caption_justify="left", caption="p: two-sided, Holm over the announced claims")
    for heading in ("claim", "", "effect", "p", "answer"):
        table.add_column(heading)
    for outcome in announced:
        first = outcome.tested[0]
        effect = "" if first.effect is None else f"{first.effect.mean:+.2f} {first.part.unit}"
        p = "" if outcome.adjusted is None else f"{outcome.adjusted:.3f}"
        table.add_row(str(outcome.number), Text(outcome.text), effect, p, outcome.answer)
    console.print(table)
    console.print(Text(answer.tally(outcomes)))
