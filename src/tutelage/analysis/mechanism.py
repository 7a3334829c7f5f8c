"""Where a student gains: what `tutelage eval --mechanism` wrote, for a terminal and as figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from polars.exceptions import PolarsError
from rich.table import Table
from rich.text import Text
from scipy import stats

from tutelage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

_HEADINGS = {
    "all": "",
    "entropy": "baseline entropy (nats)",
    "entropy contrast": "highest minus lowest",
    "right": "first choice right",
    "right contrast": "teacher minus baseline",
    "closer": "probability of the token",
    "closer contrast": "closer minus not",
}
"""Above the cells of a grouping, or in place of a difference's longer label."""
CHANCE = (
    "Sorting tokens by who did well on them also sorts by luck: tokens on which the baseline was unlucky "
    "improve with any other model, so compare these cells with those of a baseline of another seed."
)
"""What to keep in mind where cells are made with the gold token: regression to the mean."""


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A finished mechanism evaluation.

    Attributes:
        student: id of the model trained with the teacher.
        teacher: id of its teacher.
        baseline: id of the model trained without.
        text: name and split of what was read.
        documents: number of documents read.
        tokens: number of tokens read.
        context: length of the windows in tokens.
        cells: summary.parquet with the ends `low95` and `high95` of 95% intervals (Student's t over
            documents; null for one document).
    """

    student: str
    teacher: str
    baseline: str
    text: str
    documents: int
    tokens: int
    context: int
    cells: pl.DataFrame

    def of(self, quantity: str, of: str, *groupings: str) -> pl.DataFrame:
        """The cells of one quantity in one or more groupings, in their order."""
        chosen = (pl.col("quantity") == quantity) & (pl.col("of") == of)
        return self.cells.filter(chosen & pl.col("grouping").is_in(groupings))


def read_mechanism(directory: Path) -> Mechanism:
    """Read the result files in `directory`.

    Raises:
        UserError: a file is missing or is not what the evaluation writes.
    """
    try:
        facts = json.loads((directory / "mechanism.json").read_text(encoding="utf-8"))
        cells = pl.read_parquet(directory / "summary.parquet")
        return Mechanism(
            student=facts["student"],
            teacher=facts["teacher"],
            baseline=facts["baseline"],
            text=f"{facts['text']}, {facts['split']} split",
            documents=facts["documents"],
            tokens=facts["tokens"],
            context=facts["context"],
            cells=_with_intervals(cells),
        )
    except (OSError, ValueError, KeyError, TypeError, PolarsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory}: no finished mechanism evaluation ({type(error).__name__}: {reason}); delete it "
            "and evaluate again"
        ) from None


def _with_intervals(cells: pl.DataFrame) -> pl.DataFrame:
    """Student's t with one degree of freedom less than documents."""
    factor = pl.Series(stats.t.ppf(0.975, cells["documents"].to_numpy() - 1))
    half = pl.col("stderr") * factor
    return cells.with_columns(low95=pl.col("mean") - half, high95=pl.col("mean") + half)


def print_mechanism(found: Mechanism, console: Console) -> None:
    """Print the gain overall and in every cell but those by position, with 95% intervals."""
    table = Table(
        title=Text(f"Where the student gains: {found.text}, {found.tokens:,} tokens of {found.documents:,} "
                   "documents"),
        caption=Text(
            "nats per token; gain: cross-entropy of the baseline less that of the student, lead: less that "
            f"of the teacher; 95% intervals over documents. {CHANCE}"
        ),
        caption_justify="left",
        box=None,
        pad_edge=False,
    )  # fmt: skip
    table.add_column("tokens")
    for heading in ("share", "baseline CE", "gain", "teacher's lead"):
        table.add_column(heading, justify="right")
    gains, leads, losses = (
        {(row["grouping"], row["bin"]): row for row in found.of(*which, *_HEADINGS).iter_rows(named=True)}
        for which in (("gain", "student"), ("gain", "teacher"), ("gold_logp", "baseline"))
    )
    before = ""
    for key, gain in gains.items():
        heading, is_cell = _HEADINGS[key[0]], not key[0].endswith("contrast")
        if heading and is_cell and key[0] != before:
            table.add_row(Text(heading, style="bold"))
        before = key[0]
        table.add_row(
            Text(("  " if heading else "") + (gain["label"] if is_cell else heading)),
            f"{gain['n'] / found.tokens:.1%}" if is_cell else "",
            f"{-losses[key]['mean']:.3f}" if is_cell else "",
            _plus_minus(gain),
            _plus_minus(leads[key]),
        )
    console.print(table)


def _plus_minus(cell: dict[str, Any]) -> str:
    """`+0.123 ± 0.045`, or the mean alone where there is no interval."""
    if cell["high95"] is None:
        return f"{cell['mean']:+.3f}"
    return f"{cell['mean']:+.3f} ± {cell['high95'] - cell['mean']:.3f}"
