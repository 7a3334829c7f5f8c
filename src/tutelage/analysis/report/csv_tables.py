"""Write the tables of a report for other programs: `tables/*.csv` beside it."""

from __future__ import annotations

from dataclasses import asdict, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import polars as pl

from tutelage.analysis.report.accuracy_rows import accuracy_records
from tutelage.analysis.report.report_rows import policy_tables
from tutelage.analysis.report.report_table import estimate_record
from tutelage.analysis.stats import TextSpread
from tutelage.analysis.words import effect, is_judged
from tutelage.files import own_directory, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tutelage.analysis.claims.judge import ClaimResult, JudgedStudy
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results

CsvRow = dict[str, Any]


def tables_of(study: JudgedStudy) -> dict[str, pl.DataFrame]:
    """The tables gains, pairs, claims, policies, accuracy and scores.

    Gains are percent fewer bits per byte than without a teacher, intervals are 95%; see
    docs/explanation/verdicts-and-claims.md.
    """
    return {
        "gains": pl.DataFrame(_gains(study.findings), infer_schema_length=None),
        "pairs": pl.DataFrame(_pairs(study.findings), infer_schema_length=None),
        "claims": pl.DataFrame(_claims(study.claims), infer_schema_length=None),
        "policies": pl.DataFrame(
            [record for table in policy_tables(study) for record in table.records()], infer_schema_length=None
        ),
        "accuracy": pl.DataFrame(accuracy_records(study), infer_schema_length=None),
        "scores": _scores(study.results),
    }


def save_tables(study: JudgedStudy, directory: Path) -> None:
    """Write `gains.csv`, `pairs.csv`, `claims.csv`, `policies.csv`, `accuracy.csv` and `scores.csv`.

    A table without rows is no file: `policies.csv` needs arms that are no constants, `accuracy.csv` tasks.
    """
    own_directory(directory)
    for name, table in tables_of(study).items():
        path = directory / f"{name}.csv"
        if not table.is_empty():
            write_text(path, table.write_csv())
        elif path.is_file():  # of an earlier report
            path.unlink()


def _scores(results: Results) -> pl.DataFrame:
    """One row per run, text and metric, test split: what every other number is made of."""
    columns = ("run", "kind", "student", "teacher", "arm", "stage", "seed")
    scores = results.scores.filter(split="test").select("run", "domain", "metric", "value", "version")
    return results.runs.select(columns).join(scores, on="run", maintain_order="left_right")


def _gains(findings: Findings) -> list[CsvRow]:
    """One row per cell, fit and side; `interval` says over what it runs, "none" of one seed.

    `noise_low` and `noise_high` bound what the choice of documents does, training noise left out. `teachers`
    is how many trained teachers are behind the seeds, `text_...` how much the mean depends on its texts:
    standard deviation over texts, smallest and largest mean without one of them, and the ends of an interval
    with seeds and texts as samples.
    """
    return [
        {"student": v.student, "teacher": v.teacher, "arm": v.arm, "alpha": v.alpha, "stage": v.stage}
        | {"fit": fit, "side": side, "interval": "seeds" if is_judged(estimate) else "none"}
        | {"words": effect(estimate)}
        | estimate_record("gain", estimate)
        | estimate_record("noise", v.noise.get((fit, side)))
        | {"teachers": v.n_teachers}
        | _texts(v.texts.get(fit) if side == "out_of_domain" else None)
        for v in findings.verdicts
        for (fit, side), estimate in v.gains.items()
    ]


def _texts(spread: TextSpread | None) -> CsvRow:
    if spread is None:
        return dict.fromkeys(f"text_{field.name}" for field in fields(TextSpread))
    return {f"text_{name}": value if isfinite(value) else None for name, value in asdict(spread).items()}


def _pairs(findings: Findings) -> list[CsvRow]:
    """One row per student and teacher."""
    return [
        {
            "student": pair.student.name,
            "teacher": pair.teacher.name,
            "control": pair.teacher.control,
            "relation": pair.relation,
            "nominal": pair.nominal,
            "teacher_bits_per_byte": pair.bits_per_byte,
            "student_bits_per_byte": pair.student_bits,
            "best": None if pair.best is None else pair.best.arm,
            "as_good": " ".join(f"{alpha:g}" for alpha in pair.flat) or None,
        }
        for pair in findings.pairs
    ]


def _claims(outcomes: Sequence[ClaimResult]) -> list[CsvRow]:
    """One row per test of a claim and fit; a test without numbers has a row without an effect.

    `answer` and p are of the claim's primary gains; `holds` is of the test by itself. `members` is how many
    pairs (or whatever a mean is over) the effect is a mean of.
    """
    return [
        {
            "claim": outcome.number,
            "text": outcome.text,
            "announced": outcome.announced,
            "fit": fit,
            "primary": primary,
            "answer": outcome.answer if primary else None,
            "p": outcome.p if primary else None,
            "p_adjusted": outcome.adjusted if primary else None,
            "test": tested.test.label,
            "beside": tested.test.beside,
            "holds": tested.holds,
            "members": len(tested.test.members),
            "statement": tested.test.reads(),
            "unit": tested.test.unit,
        }
        | estimate_record("effect", tested.effect)
        for outcome in outcomes
        for primary, fit, tests in (
            (True, outcome.primary, outcome.tests),
            (False, outcome.other_fit, outcome.other),
        )
        for tested in tests
    ]
