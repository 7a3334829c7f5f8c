"""The tables of the report as text: what each row says, ready to be put on a page."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from tutelage.analysis import words
from tutelage.analysis.figures.run_figures import calibration_errors
from tutelage.analysis.tables import equal_compute, ledger, seed_spread, tournaments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import ClaimResult, JudgedStudy, TestResult
    from tutelage.analysis.gains import Fit
    from tutelage.analysis.stats import Estimate, TextSpread
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results
    from tutelage.study.token_tables import TokenComparison

Row = dict[str, Any]
_SHOWN_DIGITS = 100
_FITS: dict[Fit, str] = {"raw": "raw", "temperature": "temperature fitted", "unigram": "calibration fitted"}


def claim_rows(outcomes: Sequence[ClaimResult]) -> list[Row]:
    """Claims with their answers, effects and what would decide them."""
    return [
        {
            "number": outcome.number,
            "text": outcome.text,
            "answer": outcome.answer,
            "p": "" if outcome.adjusted is None else _p(outcome.adjusted),
            "parts": [_test(tested) for tested in outcome.tests],
            "primary": _FITS[outcome.primary],
            "other": _FITS[outcome.other_fit],
            "other_parts": [_test(tested) for tested in outcome.other],
            "open": outcome.open,
            "remark": outcome.remark,
        }
        for outcome in outcomes
    ]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"  # noqa: PLR2004 - three digits are shown


def _test(result: TestResult) -> Row:
    test, effect = result.test, result.effect
    numbers = None
    if effect is not None:
        spread = f"{_number(effect.low)} to {_number(effect.high)}"
        unit = test.unit if test.unit in {"", "%"} else f" {test.unit}"
        numbers = f"{_number(effect.mean)}{unit} ({spread}; n = {effect.n})"
    label = f"{test.label} (beside)" if test.beside else test.label
    return {"label": label, "reads": test.reads(), "effect": numbers}


def _number(value: float) -> str:
    """Two decimals, more where they would hide a small number."""
    if value and abs(value) < 1 / _SHOWN_DIGITS:
        return f"{value:+.2g}"
    return f"{value + 0.0:+.2f}"


def verdict_row(v: Verdict) -> Row:
    """A verdict as text."""
    return {
        "teacher": v.teacher or words.NO_TEACHER,
        "arm": words.arm(v),
        "gains": [_gain(v.in_domain), _gain(v.out_of_domain), _gain(v.fitted)],
        "noise": [_half(v.noise.get(("raw", side))) for side in ("in_domain", "out_of_domain")],
        "texts": _texts(v.texts.get("raw")),
        "interval": words.interval_name(v),
        "words": words.verdict(v),
    }


def _gain(estimate: Estimate | None) -> dict[str, str] | None:
    if estimate is None:
        return None
    colours = {"helps": "helps", "hurts": "hurts", words.NOT_JUDGED: "soft"}
    return {
        "mean": words.signed(estimate.mean, 2),
        "span": words.span(estimate),
        "effect": colours.get(words.effect(estimate), "unclear"),
    }


def _texts(spread: TextSpread | None) -> dict[str, str]:
    """Interval of the out-of-domain gain with texts as a sample, and its range without one of them."""
    if spread is None:
        return {"span": "one text", "without": ""}
    ends = f"{words.signed(spread.low, 2)[:-1]} to {words.signed(spread.high, 2)[:-1]}"
    return {
        "span": ends if isfinite(spread.low) else "one seed",
        "without": f"without one text: {words.without_one(spread)}",
    }


def _half(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"± {(estimate.high - estimate.low) / 2:.2f}"


def pair_row(pair: PairFinding) -> Row:
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
        "best": None if pair.best is None else verdict_row(pair.best),
    }


def domain_table(findings: Findings, student: str) -> Row:
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


def tournament_tables(study: JudgedStudy) -> list[Row]:
    """One table per pair with other arms than constants."""
    return [
        {
            "title": f"{pair.student.name}, taught by {pair.teacher.name} ({pair.relation or 'control'})",
            "rows": [
                {
                    "row": verdict_row(one.verdict),
                    "best": one.verdict is pair.best,
                    "ahead": None if one.ahead is None else _gain(one.ahead),
                    "front": " and ".join(
                        name for name, on in (("raw", one.raw_front), ("fitted", one.fitted_front)) if on
                    ),
                    "cost": "" if one.cost is None else f"{one.cost:.2f}",
                }
                for one in policies
            ],
        }
        for pair, policies in tournaments(study)
    ]


def compute_rows(study: JudgedStudy) -> list[Row]:
    """Pairs at equal tokens and at equal compute."""
    return [
        {
            "pair": f"{one.pair.student.name} from {one.pair.teacher.name}",
            "row": verdict_row(one.pair.best),
            "cost": "" if one.cost is None else f"{one.cost:.2f}",
            "training": "" if one.teacher_training is None else f"{one.teacher_training:.2f}",
            "matched": None if one.matched is None else verdict_row(one.matched)["gains"],
            "lead": [None if lead is None else _gain(lead) for lead in one.lead.values()],
        }
        for one in equal_compute(study)
        if one.pair.best is not None
    ]


def calibration_rows(study: JudgedStudy) -> list[Row]:
    """Pairs at their best alpha: raw and fitted gains out of domain, change of ECE and Brier score."""
    errors = calibration_errors(study)
    rows = []
    for pair in study.findings.pairs:
        if pair.best is None or pair.best.fitted is None:
            continue
        own = errors.get(pair.best.cell, {})
        names = [f"{metric}_{side}" for metric in ("ece", "brier") for side in ("in_domain", "out_of_domain")]
        rows.append(
            {
                "pair": f"{pair.student.name} from {pair.teacher.name}",
                "arm": words.arm(pair.best),
                "gains": [
                    _gain(pair.best.gains.get((fit, "out_of_domain")))
                    for fit in ("raw", "temperature_in_domain", "temperature", "unigram")
                ],
                "errors": [f"{own[name]:+.4f}" if name in own else "" for name in names],
            }
        )
    return rows


def comparison_rows(comparisons: Sequence[TokenComparison]) -> list[Row]:
    """The gain of every token comparison: overall, by difficulty, and by who was right."""
    cells = (("all", 0), ("entropy contrast", 0), ("right", 0), ("right", 1))
    rows = []
    for one in comparisons:
        known = {
            (row["grouping"], row["bin"]): row
            for row in one.of("gain", "student", *(c[0] for c in cells)).iter_rows(named=True)
        }
        rows.append(
            {
                "student": one.student,
                "text": one.text,
                "sorter": one.sorter or "the baseline",
                "gains": [words.group_plus_minus(known[cell]) if cell in known else "" for cell in cells],
            }
        )
    return rows


def spread_rows(results: Results) -> list[Row]:
    """Untaught students: bits per byte and their spread over seeds."""
    sides = ("in_domain", "out_of_domain")
    return [
        {
            "student": row["student"],
            "n": row["n"],
            "bits": [f"{row[side]:.3f}" for side in sides],
            "spread": [
                "one seed" if row[f"{side}_spread"] is None else f"{row[f'{side}_spread']:.2f}%"
                for side in sides
            ],
        }
        for row in seed_spread(results).iter_rows(named=True)
    ]


def cost_rows(results: Results) -> list[Row]:
    """The ledger of costs."""
    several = len(results.plan.students) > 1
    return [
        {
            "student": row["student"] or "" if several else None,
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
