"""Describe the tables of questions: downstream tasks, for CSV too, and recall of the training text."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tutelage.analysis import words
from tutelage.analysis.accuracy import MEAN
from tutelage.analysis.claims.evidence import named
from tutelage.analysis.report.report_table import (
    Column,
    ReportTable,
    TableCell,
    estimate_record,
    gain_cell,
)
from tutelage.analysis.stats import Estimate, t_interval
from tutelage.types import RECALL, RECALL_BINS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tutelage.analysis.accuracy import AccuracyGain
    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.verdicts import Verdict

ACCURACY_CAPTION = (
    "Percentage points of questions answered right above the same student without a teacher, same seed and "
    "data; 95% intervals over seeds, of the same questions for all, not corrected for the number of tasks. "
    "Each pair at the alpha that is best on validation text, out of domain."
)


def accuracy_section(study: JudgedStudy) -> dict[str, Any] | None:
    """The table, and what it says; None where nothing was asked."""
    table = accuracy_table(study)
    if not table.rows:
        return None
    summed = study.results.tasks["summed_by"].is_not_null().any()
    return {
        "table": table,
        "caption": ACCURACY_CAPTION,
        "in_mean": study.accuracies.in_mean,
        "is_summed": summed,
    }


def accuracy_table(study: JudgedStudy) -> ReportTable:
    """Pairs at their best alpha, and the stages that followed: points above the untaught."""
    known = study.accuracies
    teachers = known.teachers(study.findings.gains)
    tasks = [*known.tasks] if len(known.tasks) > 1 else []
    columns = (
        Column("pair", style="row"),
        Column("alpha"),
        Column(_mean_heading(study)),
        Column("teacher itself", style="num"),
        *(Column(f"{task} ({known.tasks[task]:,})") for task in tasks),
    )
    rows: list[list[TableCell | str]] = []
    for name, verdict in _shown(study):
        alone = teachers.get(verdict.cell)
        itself = "" if alone is None else f"{alone:.1f}%"
        cells = [
            replace(_points(known.gains.get((verdict.cell, task))), effect="unclear") for task in tasks
        ]  # coloured one by one, some of many would be so by chance
        mean = _points(known.gains.get((verdict.cell, MEAN)))
        rows.append([name, words.arm(verdict), mean, itself, *cells])
    return ReportTable("Downstream tasks", columns, rows)


def short_accuracies(study: JudgedStudy) -> ReportTable:
    """The same for a terminal: the mean over tasks alone."""
    known = study.accuracies
    columns = [Column(heading) for heading in ("pair", "alpha", "untaught", _mean_heading(study))]
    rows: list[list[TableCell | str]] = []
    for name, verdict in _shown(study):
        if (found := known.gains.get((verdict.cell, MEAN))) is not None:
            points = words.plus_minus(found.gain).replace("%", "")
            rows.append([name, words.arm(verdict), f"{found.untaught:.1f}%", points])
    return ReportTable("Downstream tasks", tuple(columns), rows)


def _mean_heading(study: JudgedStudy) -> str:
    known = study.accuracies
    if len(known.in_mean) == 1:
        return f"{known.in_mean[0]} ({known.tasks[known.in_mean[0]]:,} questions)"
    return f"mean of {len(known.in_mean)} tasks"


def _shown(study: JudgedStudy) -> Iterator[tuple[str, Verdict]]:
    """Names of pairs with their best arm, and with the same arm after each stage, where any was asked."""
    asked = {cell for cell, _ in study.accuracies.gains}
    for pair in study.findings.pairs:
        if pair.best is None:
            continue
        same = (pair.best.student, pair.best.teacher, pair.best.arm)
        for verdict in study.findings.verdicts:
            if (verdict.student, verdict.teacher, verdict.arm) == same and verdict.cell in asked:
                yield named(pair), verdict


def _points(found: AccuracyGain | None) -> TableCell:
    if found is None:
        return gain_cell(None)
    cell = gain_cell(found.gain)
    seeds = f" (n = {found.gain.n})" if words.is_judged(found.gain) else ""
    note = f"{cell.note}{seeds}; alone {found.untaught:.1f}%"
    return replace(cell, text=f"{round(found.gain.mean, 1) + 0.0:+.1f}", note=note)


def accuracy_records(study: JudgedStudy) -> list[dict[str, Any]]:
    """One row per cell and task, and per cell the mean over tasks; accuracy in percent, gains in points."""
    cells = {verdict.cell: verdict for verdict in study.findings.verdicts}
    known = study.accuracies
    return [
        {
            "student": cells[cell].student,
            "teacher": cells[cell].teacher,
            "arm": cells[cell].arm,
            "alpha": cells[cell].alpha,
            "stage": cells[cell].stage,
            "task": task,
            "questions": known.tasks.get(task),
            "in_mean": task in known.in_mean,
            "untaught": found.untaught,
        }
        | estimate_record("gain", found.gain)
        for (cell, task), found in known.gains.items()
    ]


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
