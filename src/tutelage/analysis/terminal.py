"""The verdicts of a study for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tutelage.analysis import answer, words
from tutelage.analysis.outcomes import judge_claims
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
    shown = _shown(findings)
    kinds = sorted({words.interval_name(v) for v in shown})
    caption = Text(f"{words.GAIN_CAPTION} Intervals: {', '.join(kinds)}.")
    if len(shown) < len(findings.verdicts):
        caption.append(f" Best alpha of each pair; all {len(findings.verdicts)} rows are in the report.")
    table = Table(title=Text(results.plan.title), caption=caption, box=None, caption_justify="left")
    several, fitted = len({v.student for v in shown}) > 1, any(v.fitted is not None for v in shown)
    headings = ["teacher", "alpha", "in-domain", "out-of-domain", *["fitted"] * fitted, "in words"]
    for heading in ["student"] * several + headings:
        table.add_column(heading)
    for v in shown:
        left = [v.student] * several + [words.taught_by(v), words.arm(v)]
        gains = [words.plus_minus(v.in_domain), words.plus_minus(v.out_of_domain)]
        if fitted:
            gains.append("" if v.fitted is None else words.plus_minus(v.fitted))
        table.add_row(*map(Text, (*left, *gains, words.verdict(v))))
    console.print(table)
    for paragraph in answer.headline(findings):
        console.print(Text(paragraph))
    _print_claims(judge_claims(results, findings), console)
    for problem in results.problems:
        console.print(Text(f"left out: {problem}"))
    if results.unfinished.height:
        console.print(f"{results.unfinished.height} of {results.runs.height} planned runs are not done")


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
