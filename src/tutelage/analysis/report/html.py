"""Write the report, one self-contained page; the same files give the same page."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2

from tutelage.analysis import words
from tutelage.analysis.claims.evidence import MARGIN, choosing_seeds
from tutelage.analysis.claims.judge import LEVEL
from tutelage.analysis.figures.run_figures import figures
from tutelage.analysis.figures.style import save_all
from tutelage.analysis.figures.token_figures import comparison_figures
from tutelage.analysis.report import claim_rows, headline, report_rows
from tutelage.analysis.report.accuracy_rows import accuracy_section, recall_table
from tutelage.analysis.report.csv_tables import save_tables
from tutelage.analysis.report.planner_tables import planner_section
from tutelage.analysis.verdicts import SAME_LEVEL_MARGIN
from tutelage.files import short, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.figures.style import Figure
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Provenance, Results
    from tutelage.study.token_tables import TokenComparison

_MOST_DRAWN = 4
"""Students whose figures fit a page; of the others there are tables."""
_FEW_VALUES = 8


def build_report(study: JudgedStudy, directory: Path) -> Path:
    """Write `report.html`, `figures/*.{svg,png,csv}` and `tables/*.csv` to `directory`.

    Args:
        study: what was judged.
        directory: where to; usually that of the study.

    Returns:
        The path of the report. It needs no network and no other file.

    Raises:
        UserError: the directory cannot be written.
    """
    results, findings = study.results, study.findings
    students = list(dict.fromkeys(verdict.student for verdict in findings.verdicts))
    charts = figures(study, students[:_MOST_DRAWN])
    comparisons = _drawn(results.token_comparisons)
    every = [chart for _, some in (*charts.items(), *comparisons) for chart in some]
    drawings = save_all(every, directory / "figures")
    drawn: dict[str | None, list[dict[str, object]]] = {
        student: [{"figure": chart, "svg": drawings[chart.name]} for chart in some]
        for student, some in charts.items()
    }
    page = _template().render(
        style=resources.files("tutelage.analysis.report").joinpath("report.css").read_text(encoding="utf-8"),
        plan=results.plan,
        tally=headline.tally(study.claims),
        headline=headline.headline(findings, study.claims),
        students=[_student(results, findings, name, drawn) for name in students],
        undrawn=students[_MOST_DRAWN:],
        cost_figures=drawn[None],
        comparisons=[
            {"found": found, "figures": [{"figure": chart, "svg": drawings[chart.name]} for chart in some]}
            for found, some in comparisons
        ],
        token_table=report_rows.token_table(results.token_comparisons),
        sortings=list(dict.fromkeys(words.sorting(one) for one in results.token_comparisons)),
        gain_caption=words.GAIN_CAPTION,
        level=f"{LEVEL:.0%}",
        margin=f"{SAME_LEVEL_MARGIN:.0%}",
        no_difference=f"{MARGIN:g}",
        tournaments=report_rows.policy_tables(study),
        compute=report_rows.compute_table(study),
        calibration=report_rows.calibration_table(study),
        recall=recall_table(study),
        accuracy=accuracy_section(study),
        spread=report_rows.spread_table(results),
        costs=report_rows.cost_table(results),
        planner=planner_section(study),
        notes=headline.notes(results, findings),
        warnings=results.run_warnings,
        provenance=_provenance(results),
        unfinished=report_rows.unfinished_table(results),
        problems=results.problems,
        **_claims(study),
    )
    save_tables(study, directory / "tables")
    path = directory / "report.html"
    write_text(path, page)
    return path


def _drawn(comparisons: Sequence[TokenComparison]) -> list[tuple[TokenComparison, list[Figure]]]:
    """One token comparison of each teacher, with its figures, numbered."""
    first = {one.teacher: one for one in reversed(comparisons)}.values()
    return [
        (one, [replace(chart, name=f"tokens-{i}-{chart.name}") for chart in comparison_figures(one)])
        for i, one in enumerate([*reversed(first)][:_MOST_DRAWN], start=1)
    ]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (
        resources.files("tutelage.analysis.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return environment.from_string(source)


def _claims(study: JudgedStudy) -> dict[str, Any]:
    """Announced claims, other claims that have runs, and the numbers of those that have none."""
    others = [outcome for outcome in study.claims if not outcome.announced]
    tested = [outcome for outcome in others if outcome.p is not None]
    return {
        "answers": claim_rows.answer_table(study.announced),
        "claims": claim_rows.claim_rows(study.announced),
        "explored": claim_rows.claim_rows(tested),
        "power": claim_rows.found_power(study),
        "choosing": words.listed_seeds(choosing_seeds(study.results.plan)),
        "untested": [outcome.number for outcome in others if outcome.p is None],
    }


def _student(
    results: Results, findings: Findings, name: str, drawn: dict[str | None, list[dict[str, object]]]
) -> dict[str, Any]:
    """Everything about one student setting."""
    student = next(student for student in results.plan.students if student.name == name)
    students = list(dict.fromkeys(v.student for v in findings.verdicts))
    verdicts = [v for v in findings.verdicts if v.student == name]
    fitted = any(v.fitted is not None for v in verdicts)
    own = [pair for pair in findings.pairs if pair.student.name == name]
    several = any(pair.best is not None and pair.best.judged for pair in own)
    pairs = [report_rows.pair_row(pair) for pair in own if pair.best is None or pair.best.judged]
    alone = [
        report_rows.pair_row(pair) for pair in own if not several or (pair.best and not pair.best.judged)
    ]
    label = "Every teacher and alpha" + (f", {name}" if len(students) > 1 else "")
    return {
        "id": students.index(name) + 1,
        "name": name,
        "about": f"{student.shape}, {short(student.parameters)} parameters, "
        f"{short(student.tokens)} training tokens",
        "pairs": pairs if several else alone,
        "alone": alone if several else [],
        "verdicts": report_rows.verdict_table(verdicts, label, fitted=fitted),
        "fitted": fitted,
        "domains": report_rows.domain_table(findings, name),
        "figures": drawn.get(name, []),
    }


def _provenance(results: Results) -> list[tuple[str, str]]:
    """What the finished runs have in common, and where they differ all values."""
    records = results.provenance.values()
    versions = {name for record in records for name in record.versions}
    facts = {
        "commit": [_commit(record) for record in records],
        "device": [record.device for record in records],
        "threads": ["torch's choice" if r.threads is None else str(r.threads) for r in records],
        "command": [r.command if isinstance(r.command, str) else " ".join(r.command) for r in records],
    }
    facts |= {name: [record.versions.get(name) or "none" for record in records] for name in sorted(versions)}
    listed = [(name, _different(values)) for name, values in facts.items() if values]
    times = sorted(record.time for record in records)
    return [("runs started", f"{times[0]} to {times[-1]}"), *listed] if times else []


def _different(values: list[str]) -> str:
    """Each value once; of many the first few."""
    found = sorted(set(values))
    rest = f" and {len(found) - _FEW_VALUES} more" if len(found) > _FEW_VALUES else ""
    return ", ".join(found[:_FEW_VALUES]) + rest


def _commit(record: Provenance) -> str:
    return (record.commit or "unknown") + (" with uncommitted changes" if record.dirty else "")
