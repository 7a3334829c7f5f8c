"""Where a student gains: reading what `tutelage eval --mechanism` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
from polars.exceptions import PolarsError
from scipy import stats

from tutelage.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A finished mechanism evaluation.

    Attributes:
        student: id of the model trained with the teacher.
        teacher: id of its teacher.
        baseline: id of the model trained without.
        sorter: id of the third model that tokens are sorted by; None: they are sorted by the baseline.
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
    sorter: str | None
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
            sorter=facts.get("sorter"),
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


def read_mechanisms(directory: Path) -> tuple[tuple[Mechanism, ...], list[str]]:
    """What `tutelage eval --mechanism --output DIRECTORY` left there, and what is wrong with it."""
    found: list[Mechanism] = []
    problems: list[str] = []
    for path in sorted(directory.glob("mechanism/*/*/mechanism.json")):
        try:
            found.append(read_mechanism(path.parent))
        except UserError as error:
            problems.append(str(error))
    return tuple(found), problems
