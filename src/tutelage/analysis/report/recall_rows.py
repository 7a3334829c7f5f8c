"""Describe the table of recall: what students know of their training text, beside untaught ones."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from tutelage.analysis import words
from tutelage.analysis.claims.evidence import named
from tutelage.analysis.report.report_table import Column, ReportTable, TableCell, gain_cell
from tutelage.analysis.stats import Estimate, t_interval
from tutelage.types import RECALL, RECALL_BINS

if TYPE_CHECKING:
    from tutelage.analysis.claims.judge import JudgedStudy


def recall_gains(study: JudgedStudy) -> dict[int, dict[str, tuple[float, Estimate]]]:
    """Accuracy of the untaught, and what a cell's is above it, by cell and bin of `RECALL_BINS`.

    In percent and in points, means over the seeds of which both were asked the same questions, with the 95% t
    interval of the difference.
    """
    found: dict[int, dict[str, tuple[float, Estimate]]] = {}
    for name, _ in RECALL_BINS:
        pairs: dict[int, list[tuple[float, float]]] = {}
        scores = study.by_fit["raw"].scores(f"accuracy_{name}", RECALL)
        for (cell, _), (accuracy, untaught) in scores.items():
            pairs.setdefault(cell, []).append((100 * fmean(untaught), 100 * accuracy))
        for cell, seeds in pairs.items():
            points = [taught - alone for alone, taught in seeds]
            several = len(points) > 1
            change = t_interval(points) if several else Estimate(points[0], points[0], points[0], 1)
            found.setdefault(cell, {})[name] = fmean(alone for alone, _ in seeds), change
    return found


def recall_table(study: JudgedStudy) -> ReportTable:
    """Pairs at their best alpha: points of accuracy above the untaught, by how often facts were read."""
    gains = recall_gains(study)
    best = [(pair, pair.best) for pair in study.findings.pairs if pair.best and pair.best.cell in gains]
    bins = {name: heading for name, heading in RECALL_BINS if any(name in gains[v.cell] for _, v in best)}
    columns = (
        Column("pair", style="row"),
        Column("alpha"),
        *(Column(heading) for heading in bins.values()),
    )
    rows: list[list[TableCell | str]] = []
    for pair, verdict in best:
        cells = []
        for name in bins:
            alone, change = gains[verdict.cell].get(name, (0.0, None))
            cell = gain_cell(change)
            if change is not None:
                seeds = f" (n = {change.n})" if words.is_judged(change) else ""
                note = f"{cell.note}{seeds}; alone {alone:.1f}%"
                cell = replace(cell, text=f"{change.mean:+.1f}", note=note)
            cells.append(cell)
        rows.append([named(pair), words.arm(verdict), *cells])
    return ReportTable("Recall of each pair", columns, rows)
