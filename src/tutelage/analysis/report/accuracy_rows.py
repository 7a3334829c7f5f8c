"""Describe the tables of questions: downstream tasks, for CSV too, and recall of the training text."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tutelage.analysis import words
from tutelage.analysis.accuracy import MEAN, AccuracyGain, points_gained
from tutelage.analysis.claims.evidence import named
from tutelage.analysis.report.report_table import (
    Column,
    ReportTable,
    TableCell,
    estimate_record,
    gain_cell,
)
from tutelage.types import RECALL, RECALL_BINS

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def recall_gains(study: JudgedStudy) -> dict[int, dict[str, AccuracyGain]]:
    """What a cell's accuracy is above that of the untaught, by cell and bin of `RECALL_BINS`.

    Over the seeds of which both were asked the same questions.
    """
    found: dict[int, dict[str, AccuracyGain]] = {}
    by_seed = study.by_fit["raw"]
    for name, _ in RECALL_BINS:
        metric = f"accuracy_{name}"
        known = study.results.scores.filter(metric=metric, domain=RECALL)
        asked = dict(known.select("run", "n").iter_rows())
        questions = {place: asked[run] for (run, _), place in by_seed.runs.items() if run in asked}
        seeds: dict[int, list[tuple[float, float, int]]] = {}
        for place, (accuracy, untaught) in by_seed.scores(metric, RECALL).items():
            one = 100 * fmean(untaught), 100 * accuracy, questions[place]
            seeds.setdefault(place[0], []).append(one)
        for cell, some in seeds.items():
            fewest = min(count for _, _, count in some)
            points = points_gained([taught - alone for alone, taught, _ in some], 100 / fewest)
            found.setdefault(cell, {})[name] = AccuracyGain(fmean(alone for alone, _, _ in some), points)
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
    rows: list[list[TableCell | str]] = [
        [named(pair), words.arm(verdict), *(_points(gains[verdict.cell].get(name)) for name in bins)]
        for pair, verdict in best
    ]
    return ReportTable("Recall of each pair", columns, rows)
