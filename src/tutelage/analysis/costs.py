"""What the study cost, per kind of run, in FLOPs and seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from tutelage.study.results import Results

_MEANS = ["tokens", "train_flops", "teacher_flops", "seconds", "tokens_per_second"]
_KINDS = {"baseline": 0, "student": 1, "after": 2, "teacher": 3}
_UNTAUGHT = "no teacher"


def ledger(results: Results) -> pl.DataFrame:
    """One row per kind of run that has finished runs: no teacher, student of X, after a stage, training of X.

    Columns: label, kind, student (null for teachers), teacher, stage, runs (number finished), tokens,
    train_flops (forward and backward of the trained model), teacher_flops (forward of its teacher), seconds,
    tokens_per_second. All but `runs` are means per run.
    """
    teachers = {teacher.name: i for i, teacher in enumerate(results.plan.teachers)}
    students = {student.name: i for i, student in enumerate(results.plan.students)}
    untaught = (pl.col("kind") == "student") & pl.col("teacher").is_null()
    label = (
        pl.when(untaught)
        .then(pl.format("{}, {}", pl.lit(_UNTAUGHT), "arm"))
        .when(pl.col("kind") == "student")
        .then(pl.format("student of {}", "teacher"))
        .when(pl.col("kind") == "teacher")
        .then(pl.format("training of {}", "teacher"))
        .when(pl.col("kind") == "after")
        .then(pl.format("{} of {}", "stage", pl.col("teacher").fill_null(_UNTAUGHT)))
        .otherwise(pl.lit(_UNTAUGHT))
    )
    return (
        results.runs.filter(status="done")
        .with_columns(label=label)
        .group_by("kind", "student", "teacher", "stage", "label")
        .agg(pl.len().alias("runs"), pl.col(_MEANS).mean())
        .sort(
            pl.col("student").replace_strict(students, default=len(students), return_dtype=pl.Int64),
            pl.col("kind").replace_strict(_KINDS, return_dtype=pl.Int64),
            pl.col("teacher").replace_strict(teachers, default=-1, return_dtype=pl.Int64),
            "label",
        )
        .select("label", "kind", "student", "teacher", "stage", "runs", *_MEANS)
    )


def overhead(results: Results) -> dict[str, float]:
    """FLOPs per token of a student with each teacher, as a multiple of its own; mean over students."""
    students = (
        results.runs.filter(kind="student", status="done")
        .filter(pl.col("teacher").is_not_null(), pl.col("train_flops") > 0)
        .with_columns(factor=1 + pl.col("teacher_flops") / pl.col("train_flops"))
        .group_by("student", "teacher")
        .agg(pl.col("factor").max())
    )
    order = [teacher.name for teacher in results.plan.teachers]
    factors = {name: students.filter(teacher=name)["factor"] for name in order}
    return {name: float(found.to_numpy().mean()) for name, found in factors.items() if len(found)}
