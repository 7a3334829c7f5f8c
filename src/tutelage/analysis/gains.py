"""Gains of students over the runs they are compared with, as tables.

A gain is in percent of the bits per byte of the run named by the plan, of the same seed; positive is better
(fewer bits). Where a seed has several untaught runs (`baselines` in a study file) it is in percent of their
mean. The out-of-domain gain is the mean of the domains' gains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import polars as pl

from tutelage.analysis.stats import half_width

if TYPE_CHECKING:
    from tutelage.study.results import Results

Fit = Literal["raw", "temperature", "unigram", "temperature_in_domain"]
Side = Literal["in_domain", "out_of_domain"]

_METRICS: tuple[tuple[Fit, str], ...] = (
    ("raw", "bits_per_byte"),
    ("temperature", "bits_per_byte_temperature"),
    ("unigram", "bits_per_byte_unigram"),
    ("temperature_in_domain", "bits_per_byte_temperature_in_domain"),
)
_CELL = ["student", "teacher", "arm", "stage"]


@dataclass(frozen=True, eq=False)
class Gains:
    """Every finished comparison.

    Attributes:
        cells: one row per student setting, teacher, arm and stage that has one: cell (its number, in the
            report's order), student, teacher, arm, stage, alpha, control (true of teachers without context
            and of students without a teacher), constant (whether alpha is all there is to the arm), pair
            (number of student and teacher).
        domains: one row per cell, seed, domain, split and fit: run, base_run, teacher_run, role, value and
            base_value (bits per byte), gain. `fit` is raw, or what was fitted on the validation split:
            temperature, or temperature and a mixture with the unigram; or temperature_in_domain, fitted on
            the validation split of each run's own training text (test split only).
        sides: cell, seed, split, fit, role, gain: mean over the domains of a role.
        estimates: cell, split, fit, role, gain (mean over seeds), n (seeds), low, high (95% t interval; null
            for one seed).
    """

    cells: pl.DataFrame
    domains: pl.DataFrame
    sides: pl.DataFrame
    estimates: pl.DataFrame


def measure(results: Results) -> Gains:
    """All gains that the finished runs allow; tables without rows if there is none."""
    cells = _cells(results)
    domains = _by_domain(results, cells)
    cells = cells.join(domains.select("cell").unique(), on="cell", how="semi")
    return from_domains(cells, domains)


def from_domains(cells: pl.DataFrame, domains: pl.DataFrame) -> Gains:
    """Means over domains and over seeds of `domains`."""
    sides = (
        domains.group_by("cell", "seed", "split", "fit", "role", maintain_order=True)
        .agg(pl.col("gain").mean())
        .sort("cell", "split", "fit", "role", "seed")
    )
    estimates = sides.group_by("cell", "split", "fit", "role", maintain_order=True).agg(
        pl.col("gain").mean(), n=pl.len(), deviation=pl.col("gain").std()
    )
    half = half_width(estimates["n"].to_numpy(), estimates["deviation"].cast(pl.Float64).to_numpy())
    estimates = (
        estimates.with_columns(half=pl.Series(half, dtype=pl.Float64).fill_nan(None))
        .with_columns(low=pl.col("gain") - pl.col("half"), high=pl.col("gain") + pl.col("half"))
        .drop("half", "deviation")
    )
    return Gains(cells, domains, sides, estimates)


def _cells(results: Results) -> pl.DataFrame:
    """Constant alphas first and rising, then the other arms in the plan's order."""
    students = {student.name: i for i, student in enumerate(results.plan.students)}
    teachers = {teacher.name: i for i, teacher in enumerate(results.plan.teachers)}
    controls = [teacher.name for teacher in results.plan.teachers if teacher.control]
    alone = pl.format("alpha {}", pl.col("alpha").map_elements(lambda a: f"{a:g}", return_dtype=pl.String))
    return (
        results.runs.filter(pl.col("baseline").is_not_null())
        .unique(_CELL, keep="first", maintain_order=True)
        .with_columns(
            constant=(pl.col("arm") == alone).fill_null(value=False),
            control=pl.col("teacher").is_in(controls).fill_null(value=True),
            place=pl.col("student").replace_strict(students, return_dtype=pl.Int64),
            teacher_place=pl.col("teacher").replace_strict(
                teachers, default=len(teachers), return_dtype=pl.Int64
            ),
        )
        .sort(
            "place",
            "stage",
            "teacher_place",
            ~pl.col("constant"),
            pl.when("constant").then("alpha"),
            nulls_last=[False, False, False, False, True],
            maintain_order=True,
        )
        .with_columns(pair=pl.col("place") * (len(teachers) + 1) + pl.col("teacher_place"))
        .select(*_CELL, "alpha", "control", "constant", "pair")
        .with_row_index("cell")
    )


def twins_of(results: Results) -> pl.DataFrame:
    """Every run that others are compared with, and the runs whose mean counts.

    Returns:
        base_run, run: an untaught run comes with itself and with those of its student, stage and seed that
        differ from it in their initial weights alone.
    """
    untaught = results.runs.filter(
        pl.col("kind").is_in(["baseline", "after"]), pl.col("teacher").is_null(), pl.col("arm").is_null()
    )
    place = ["student", "stage", "seed"]
    first = untaught.filter(twin=0).select(*place, base_run="run")
    return first.join(untaught, on=place, nulls_equal=True).select("base_run", "run")


def base_scores(results: Results) -> pl.DataFrame:
    """Scores of what runs are compared with, means over twins: base_run, domain, split, metric, value."""
    return (
        twins_of(results)
        .join(results.scores, on="run")
        .group_by("base_run", "domain", "split", "metric")
        .agg(pl.col("value").mean())
    )


def _by_domain(results: Results, cells: pl.DataFrame) -> pl.DataFrame:
    roles = pl.DataFrame([(d.name, d.role) for d in results.plan.domains], ["domain", "role"], orient="row")
    fits = pl.DataFrame(_METRICS, ["fit", "metric"], orient="row")
    scored = (
        results.scores.join(fits, on="metric")
        .join(roles, on="domain")
        .select("run", "domain", "role", "split", "fit", "value")
    )
    base = base_scores(results).join(fits, on="metric").rename({"value": "base_value"}).drop("metric")
    runs = results.runs.join(cells, on=_CELL, nulls_equal=True).select(
        "run", "seed", "cell", "teacher_run", base_run="baseline"
    )
    return (
        runs.join(scored, on="run")
        .join(base, on=["base_run", "domain", "split", "fit"])
        .with_columns(gain=100 * (1 - pl.col("value") / pl.col("base_value")))
        .sort("cell", "seed", "split", "fit", "domain")
    )
