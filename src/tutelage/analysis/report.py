"""One self-contained page: does this teacher help this student? The same files give the same page."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import polars as pl

from tutelage.analysis import words
from tutelage.analysis.canvas import save_all
from tutelage.analysis.costs import ledger
from tutelage.analysis.plots import figures
from tutelage.analysis.verdicts import SAME_LEVEL_MARGIN, Findings, judge
from tutelage.files import write_text
from tutelage.study.results import Provenance, Results, load_results

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.analysis.stats import Estimate
    from tutelage.analysis.verdicts import TeacherFinding, Verdict


def build_report(directory: Path) -> Path:
    """Write `directory/report.html` and `directory/figures/*.{svg,png,csv}` from the study's result files.

    Args:
        directory: a study directory, with `plan.json` and its runs.

    Returns:
        The path of the report. It needs no network and no other file.

    Raises:
        UserError: there is no valid plan, no finished student with a no-teacher run of its seed, or the
            directory cannot be written.
    """
    results = load_results(directory)
    findings = judge(results)
    charts = figures(results, findings)
    drawings = save_all(charts, directory / "figures")
    page = _template().render(
        plan=results.plan,
        headline=words.headline(findings),
        student=_student(results),
        teachers=[_teacher(finding, findings) for finding in findings.teachers],
        verdicts=[_row(v) for v in findings.verdicts],
        gain_caption=words.GAIN_CAPTION,
        margin=f"{SAME_LEVEL_MARGIN:.0%}",
        figures=[{"figure": chart, "svg": drawings[chart.name]} for chart in charts],
        domains=_domains(findings),
        costs=_costs(results),
        notes=words.notes(results, findings),
        provenance=_provenance(results),
        unfinished=_unfinished(results),
        problems=results.problems,
    )
    path = directory / "report.html"
    write_text(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("tutelage.analysis").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _student(results: Results) -> str:
    student = results.plan.students[0]
    return (
        f"{student.rung}, {words.count(student.parameters)} parameters, "
        f"{words.count(student.tokens)} training tokens"
    )


def _teacher(finding: TeacherFinding, findings: Findings) -> dict[str, Any]:
    """One line of the first table: what the teacher is, and its best result."""
    own = None
    if finding.bits_per_byte is not None:
        difference = 100 * (finding.bits_per_byte / findings.student_bits_per_byte - 1)
        own = f"{finding.bits_per_byte:.3f} bits per byte ({words.signed(difference)})"
    return {
        "name": finding.teacher.name,
        "description": finding.teacher.description,
        "relation": "control" if finding.teacher.control else finding.relation or "not measured",
        "own": own,
        "best": None if finding.best is None else _row(finding.best),
    }


def _row(v: Verdict) -> dict[str, Any]:
    """A verdict as text for the tables."""
    return {
        "teacher": v.teacher,
        "alpha": f"{v.alpha:g}",
        "gains": [_gain(v.in_domain), _gain(v.out_of_domain)],
        "interval": words.interval_name(v),
        "words": words.verdict(v),
    }


def _gain(estimate: Estimate) -> dict[str, str]:
    effect = words.effect(estimate)
    return {
        "mean": words.signed(estimate.mean, 2),
        "span": words.span(estimate),
        "effect": effect if effect in ("helps", "hurts") else "unclear",
    }


def _domains(findings: Findings) -> dict[str, Any]:
    """Rows by text: bits per byte without a teacher, and the gain of each teacher at its best alpha."""
    best = [finding.best for finding in findings.teachers if finding.best is not None]
    order = findings.domains.select("domain", "role").unique(maintain_order=True)
    baseline = dict(findings.baseline.select("domain", "bits_per_byte").iter_rows())
    gains = {
        (row["teacher"], row["alpha"], row["domain"]): row["gain"]
        for row in findings.domains.iter_rows(named=True)
    }
    rows = [
        {
            "name": domain,
            "role": "in domain" if role == "in_domain" else "out of domain",
            "baseline": f"{baseline[domain]:.3f}",
            "gains": [words.signed(gains[v.teacher, v.alpha, domain]) for v in best],
        }
        for domain, role in order.iter_rows()
    ]
    return {"columns": [f"{v.teacher}, alpha {v.alpha:g}" for v in best], "rows": rows}


def _costs(results: Results) -> list[dict[str, str]]:
    return [
        {
            "label": row["label"],
            "runs": str(row["runs"]),
            "tokens": words.count(row["tokens"]),
            "train": f"{row['train_flops']:.2e}",
            "teacher": f"{row['teacher_flops']:.2e}" if row["teacher_flops"] else "none",
            "seconds": f"{row['seconds']:.0f}",
            "speed": words.count(row["tokens_per_second"]),
        }
        for row in ledger(results).iter_rows(named=True)
    ]


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
    listed = [(name, ", ".join(sorted(set(values)))) for name, values in facts.items() if values]
    times = sorted(record.time for record in records)
    return [("runs started", f"{times[0]} to {times[-1]}"), *listed] if times else []


def _commit(record: Provenance) -> str:
    return (record.commit or "unknown") + (" with uncommitted changes" if record.dirty else "")


def _unfinished(results: Results) -> list[dict[str, str]]:
    rows = results.unfinished.with_columns(pl.col("error").fill_null(""))
    return [
        {"run": row["run"], "status": row["status"], "error": " ".join(row["error"].split())}
        for row in rows.iter_rows(named=True)
    ]
