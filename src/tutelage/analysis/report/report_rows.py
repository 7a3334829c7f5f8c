"""Describe the tables of the report, each once for page, terminal and CSV."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from tutelage.analysis import words
from tutelage.analysis.claims.evidence import named
from tutelage.analysis.report.report_table import Column, ReportTable, TableCell, gain_cell
from tutelage.analysis.tables import calibration_errors, equal_compute, ledger, seed_spread, tournaments
from tutelage.files import short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.gains import Fit
    from tutelage.analysis.stats import Estimate, TextSpread
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results
    from tutelage.study.token_tables import TokenComparison

PageRow = dict[str, Any]
_MANY = 24
"""More verdicts than this would not be read in a terminal."""
_GAINS = (Column("in-domain gain"), Column("out-of-domain gain"), Column("calibration fitted"))


def verdict_table(verdicts: Sequence[Verdict], label: str, *, fitted: bool) -> ReportTable:
    """Every verdict of a student, with what its intervals leave out."""
    columns = (
        Column("teacher", style="row"),
        Column("alpha"),
        Column("in words", style="words"),
        *_GAINS[: 3 if fitted else 2],
        Column("texts as a sample too", style="nowrap"),
        Column("interval", style="interval"),
        Column("evaluation noise, in and out", style="nowrap"),
    )
    rows: list[list[TableCell | str]] = [
        [
            v.teacher or words.NO_TEACHER,
            words.arm(v),
            words.verdict(v),
            *gain_cells(v, fitted=fitted),
            _texts(v.texts.get("raw")),
            words.interval_name(v),
            ", ".join(_half(v.noise.get(("raw", side))) for side in ("in_domain", "out_of_domain")),
        ]
        for v in verdicts
    ]
    return ReportTable(label, columns, rows)


def short_verdicts(findings: Findings, title: str) -> ReportTable:
    """Verdicts for a terminal: every arm, or of many the best of each pair."""
    shown = few_verdicts(findings)
    several, fitted = len({v.student for v in shown}) > 1, any(v.fitted is not None for v in shown)
    headings = ["student"] * several + ["teacher", "measured", "alpha", "in domain", "out of domain"]
    headings += ["fitted"] * fitted + ["in words"]
    rows: list[list[TableCell | str]] = []
    for v in shown:
        name = f"{v.teacher} control" if v.control and v.teacher else v.teacher or words.NO_TEACHER
        row = [name, "" if v.control else words.level(v), words.arm(v)]
        row += [words.plus_minus(v.in_domain), words.plus_minus(v.out_of_domain)]
        row += ["" if v.fitted is None else words.plus_minus(v.fitted)] * fitted
        rows.append([*[v.student] * several, *row, words.verdict(v)])
    return ReportTable(title, tuple(Column(heading) for heading in headings), rows)


def few_verdicts(findings: Findings) -> list[Verdict]:
    """All verdicts, or of more than would be read the best of each pair."""
    if len(findings.verdicts) <= _MANY:
        return [*findings.verdicts]
    return [pair.best for pair in findings.pairs if pair.best is not None]


def gain_cells(v: Verdict, *, fitted: bool = True) -> list[TableCell]:
    """The gains in domain, out of domain and, if asked for, with calibration fitted."""
    return [gain_cell(one) for one in (v.in_domain, v.out_of_domain, *[v.fitted] * fitted)]


def _texts(spread: TextSpread | None) -> TableCell:
    """Interval of the out-of-domain gain with texts as a sample, and its range without one of them."""
    if spread is None:
        return TableCell("one text")
    ends = f"{words.signed(spread.low, 2)[:-1]} to {words.signed(spread.high, 2)[:-1]}"
    return TableCell(
        ends if isfinite(spread.low) else "one seed", f"without one text: {words.without_one(spread)}"
    )


def _half(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"± {(estimate.high - estimate.low) / 2:.2f}"


def pair_row(pair: PairFinding) -> PageRow:
    """A teacher beside a student, and its best result."""
    own = None
    if pair.bits_per_byte is not None and pair.student_bits is not None:
        difference = 100 * (pair.bits_per_byte / pair.student_bits - 1)
        own = f"{pair.bits_per_byte:.3f} bits per byte ({words.signed(difference)})"
    elif pair.bits_per_byte is not None:
        own = f"{pair.bits_per_byte:.3f} bits per byte"
    teacher = pair.teacher
    ratios = [
        f"{theirs / ours:.2g}x {name}"
        for name, theirs, ours in (
            ("parameters", teacher.parameters, pair.student.parameters),
            ("tokens", teacher.tokens, pair.student.tokens),
        )
        if theirs is not None
    ]
    return {
        "name": teacher.name,
        "description": teacher.description,
        "relation": "control" if teacher.control else pair.relation or "not measured",
        "nominal": f"by size and tokens {pair.nominal} ({', '.join(ratios)})" if pair.nominal else None,
        "own": own,
        "flat": ", ".join(f"{alpha:g}" for alpha in pair.flat) if len(pair.flat) > 1 else None,
        "arm": None if pair.best is None else words.arm(pair.best),
        "gains": [] if pair.best is None else gain_cells(pair.best),
        "words": "" if pair.best is None else words.verdict(pair.best),
        "n": 0 if pair.best is None else pair.best.n_seeds,
    }


def domain_table(findings: Findings, student: str) -> PageRow:
    """Rows by text: bits per byte without a teacher, and the gain of each teacher at its best alpha."""
    best = [p.best for p in findings.pairs if p.best is not None and p.student.name == student]
    some = findings.domains.filter(student=student)
    order = some.select("domain", "role").unique(maintain_order=True)
    baseline = findings.baseline.filter(student=student)
    bits = dict(baseline.select("domain", "bits_per_byte").iter_rows())
    gains = {(r["cell"], r["domain"], r["fit"]): r["gain"] for r in some.iter_rows(named=True)}
    fitted = any(v.fitted is not None for v in best)

    def cells(v: Verdict, domain: str) -> list[str]:
        found = [gains.get((v.cell, domain, fit)) for fit in (("raw", "unigram") if fitted else ("raw",))]
        return ["" if gain is None else words.signed(gain) for gain in found]

    rows = [
        {
            "name": domain,
            "role": "in domain" if role == "in_domain" else "out of domain",
            "baseline": f"{bits[domain]:.3f}" if domain in bits else "",
            "gains": [cell for v in best for cell in cells(v, domain)],
        }
        for domain, role in order.iter_rows()
    ]
    return {"columns": [f"{v.teacher}, {v.arm}" for v in best], "fitted": fitted, "rows": rows}


def policy_tables(study: JudgedStudy) -> list[ReportTable]:
    """A table of each pair with other arms than constants, by falling out-of-domain gain."""
    columns = (
        *(Column(None, key) for key in ("student", "teacher", "relation")),
        Column("arm", "arm", "row"),
        Column("in-domain gain", "in_domain"),
        Column("out-of-domain gain", "out_of_domain"),
        Column("calibration fitted", "fitted"),
        Column(None, "front"),
        Column(None, "fitted_front"),
        Column(None, "cost"),
        Column("less the best constant", "ahead", estimate=True),
        Column("on the front"),
        Column("cost", style="num"),
    )
    found = []
    for pair, policies in tournaments(study):
        rows: list[list[TableCell | str]] = []
        for one in policies:
            v = one.verdict
            fronts = (("raw", one.raw_front), ("fitted", one.fitted_front))
            best = " (best constant)" if v is pair.best and v.constant else ""
            rows.append(
                [
                    pair.student.name,
                    pair.teacher.name,
                    TableCell(value=pair.relation),
                    TableCell(f"{words.arm(v)}{best}", value=v.arm),
                    *(
                        replace(gain_cell(gain), value=gain and gain.mean)
                        for gain in (v.in_domain, v.out_of_domain, v.fitted)
                    ),
                    TableCell(value=one.raw_front),
                    TableCell(value=one.fitted_front),
                    TableCell(value=one.cost),
                    gain_cell(one.ahead),
                    " and ".join(name for name, on in fronts if on),
                    _times(one.cost),
                ]
            )
        taught = f"{pair.student.name}, taught by {pair.teacher.name} ({pair.relation or 'control'})"
        found.append(ReportTable(taught, columns, rows))
    return found


def compute_table(study: JudgedStudy) -> ReportTable:
    """Pairs at equal tokens and at equal compute."""
    columns = (
        Column("pair", style="row"),
        Column("alpha"),
        *(Column(f"{side}, equal tokens") for side in ("in domain", "out of domain")),
        Column("cost", style="num"),
        Column("training the teacher", style="num"),
        *(Column(f"lead {side}, equal compute") for side in ("in domain", "out of domain")),
    )
    rows: list[list[TableCell | str]] = [
        [
            named(one.pair),
            words.arm(one.best),
            *gain_cells(one.best, fitted=False),
            _times(one.cost),
            _times(one.teacher_training),
            *map(gain_cell, one.lead.values()),
        ]
        for one in equal_compute(study)
    ]
    return ReportTable("Each pair at equal tokens and equal compute", columns, rows)


def calibration_table(study: JudgedStudy) -> ReportTable:
    """Pairs at their best alpha: raw and fitted gains out of domain, change of ECE and Brier score."""
    fits: dict[Fit, str] = {
        "raw": "gain out of domain, raw",
        "temperature_in_domain": "temperature fitted in domain",
        "temperature": "temperature fitted",
        "unigram": "and unigram mixed in",
    }
    errors = {
        "ece_in_domain": "ECE in domain",
        "ece_out_of_domain": "ECE out",
        "brier_in_domain": "Brier in domain",
        "brier_out_of_domain": "Brier out",
    }
    columns = (
        Column("pair", style="row"),
        Column("alpha"),
        *(Column(heading) for heading in fits.values()),
        *(Column(heading, style="num") for heading in errors.values()),
    )
    known = calibration_errors(study)
    rows: list[list[TableCell | str]] = []
    for pair in study.findings.pairs:
        if pair.best is None or pair.best.fitted is None:
            continue
        own = known.get(pair.best.cell, {})
        gains = [gain_cell(pair.best.gains.get((fit, "out_of_domain"))) for fit in fits]
        changes = [f"{own[name]:+.4f}" if name in own else "" for name in errors]
        rows.append([named(pair), words.arm(pair.best), *gains, *changes])
    return ReportTable("Calibration of each pair", columns, rows)


def token_table(comparisons: Sequence[TokenComparison]) -> ReportTable:
    """The gain of every token comparison: overall, by difficulty, and by who was right."""
    groups = {
        ("all", 0): "all tokens",
        ("entropy contrast", 0): "hardest fifth less easiest",
        ("right", 0): "only the teacher right",
        ("right", 1): "only the untaught right",
    }
    columns = (
        Column("student", style="row"),
        Column("text"),
        Column("tokens sorted by"),
        *(Column(heading, style="num") for heading in groups.values()),
    )
    rows: list[list[TableCell | str]] = []
    for one in comparisons:
        known = {
            (row["grouping"], row["bin"]): row
            for row in one.of("gain", "student", *(group for group, _ in groups)).iter_rows(named=True)
        }
        gains = [words.group_plus_minus(known[group]) if group in known else "" for group in groups]
        rows.append([one.student, one.text, one.sorter or "the baseline", *gains])
    return ReportTable("Token comparisons", columns, rows)


def spread_table(results: Results) -> ReportTable:
    """Untaught students: bits per byte and their spread over seeds."""
    columns = (
        Column("student", style="row"),
        Column("seeds"),
        Column("in domain (bits per byte)", style="num"),
        Column("spread", style="num"),
        Column("out of domain (bits per byte)", style="num"),
        Column("spread", style="num"),
    )
    rows: list[list[TableCell | str]] = []
    for row in seed_spread(results).iter_rows(named=True):
        cells = [row["student"], str(row["n"])]
        for side in ("in_domain", "out_of_domain"):
            spread = row[f"{side}_spread"]
            cells += [f"{row[side]:.3f}", "one seed" if spread is None else f"{spread:.2f}%"]
        rows.append([*cells])
    return ReportTable("Spread of the untaught students over seeds", columns, rows)


def cost_table(results: Results) -> ReportTable:
    """What a run of each kind costs."""
    several = len(results.plan.students) > 1
    columns = (
        *[Column("student", style="nowrap")] * several,
        Column("kind of run", style="row"),
        *(
            Column(heading, style="num")
            for heading in (
                "runs",
                "tokens",
                "FLOPs, forward and backward",
                "FLOPs, teacher forward",
                "seconds",
                "tokens per second",
            )
        ),
    )
    rows: list[list[TableCell | str]] = [
        [
            *[row["student"] or ""] * several,
            row["label"],
            str(row["runs"]),
            short(row["tokens"]),
            f"{row['train_flops']:.2e}",
            f"{row['teacher_flops']:.2e}" if row["teacher_flops"] else "none",
            f"{row['seconds']:.0f}",
            short(row["tokens_per_second"]),
        ]
        for row in ledger(results).iter_rows(named=True)
    ]
    return ReportTable("Cost of a run", columns, rows)


def unfinished_table(results: Results) -> ReportTable:
    """Planned runs that are not done, with the error of those that failed."""
    columns = (Column("run", style="row"), Column("status", style="nowrap"), Column("error"))
    rows: list[list[TableCell | str]] = [
        [row["run"], row["status"], " ".join((row["error"] or "").split())]
        for row in results.unfinished.iter_rows(named=True)
    ]
    return ReportTable("Runs that are not done", columns, rows)


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2f}"
