"""What the study cost, per kind of run, in FLOPs and seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from tutelage.study.results import Results


def ledger(results: Results) -> pl.DataFrame:
    """One row per kind of run that has finished runs: no teacher, student of X, training of X.

    Columns: label, kind, teacher, runs (number finished), tokens, train_flops (forward and backward of
    the trained model), teacher_flops (forward of its teacher), seconds, tokens_per_second. All but
    `runs` are means per run.
    """
    order = {teacher.name: i for i, teacher in enumerate(results.plan.teachers)}
    kinds = {"baseline": 0, "student": 1, "teacher": 2}
    prefix = {"baseline": "no teacher", "student": "student of ", "teacher": "training of "}
    means = ["tokens", "train_flops", "teacher_flops", "seconds", "tokens_per_second"]
    return (
        results.runs.filter(status="done")
        .group_by("kind", "teacher")
        .agg(pl.len().alias("runs"), pl.col(means).mean())
        .sort(pl.col("kind").replace_strict(kinds), pl.col("teacher").replace_strict(order, default=-1))
        .with_columns(label=pl.col("kind").replace_strict(prefix) + pl.col("teacher").fill_null(""))
        .select("label", "kind", "teacher", "runs", *means)
    )


def overhead(results: Results) -> dict[str, float]:
    """FLOPs per token of a student with each teacher, as a multiple of the student's own."""
    students = ledger(results).filter(kind="student").filter(pl.col("train_flops") > 0)
    factor = 1 + students["teacher_flops"] / students["train_flops"]
    return dict(zip(students["teacher"], factor, strict=True))
