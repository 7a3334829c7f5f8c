"""The verdicts of a study for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tutelage.analysis import words
from tutelage.analysis.verdicts import Verdict, judge

if TYPE_CHECKING:
    from rich.console import Console

    from tutelage.study.results import Results


def print_verdicts(results: Results, console: Console) -> None:
    """Print the verdict table and the headline answer.

    Raises:
        UserError: as `judge`.
    """
    findings = judge(results)
    kinds = sorted({words.interval_name(v) for v in findings.verdicts})
    caption = Text(f"{words.GAIN_CAPTION} Intervals: {', '.join(kinds)}.")
    table = Table(title=Text(results.plan.title), caption=caption, box=None, caption_justify="left")
    for heading in ("teacher", "alpha", "in-domain", "out-of-domain", "in words"):
        table.add_column(heading)
    for v in findings.verdicts:
        inside, outside = words.plus_minus(v.in_domain), words.plus_minus(v.out_of_domain)
        table.add_row(_called(v), f"{v.alpha:g}", inside, outside, words.verdict(v))
    console.print(table)
    console.print(Text(words.headline(findings)))
    for problem in results.problems:
        console.print(Text(f"left out: {problem}"))
    if results.unfinished.height:
        console.print(f"{results.unfinished.height} of {results.runs.height} planned runs are not done")


def _called(v: Verdict) -> str:
    return f"{v.teacher} {'control' if v.control else 'teacher'}"
