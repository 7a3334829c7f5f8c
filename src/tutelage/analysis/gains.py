"""Gains of students over the runs they are compared with, as tables.

A gain is in percent of the bits per byte of the run named by the plan, of the same seed; positive is better
(fewer bits). Where a seed has several untaught runs (`baselines` in a study file) it is in percent of their
mean. The out-of-domain gain is the mean of the domains' gains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from tutelage.analysis.stats import half_width
from tutelage.bootstrap import DRAWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tutelage.study.results import Results

_LOSSES = {
    "raw": "nll",
    "temperature": "nll_temperature",
    "unigram": "nll_unigram",
    "temperature_in_domain": "nll_temperature_in_domain",
}
_CELLS_AT_ONCE = 100
_COLUMNS = {
    "cell": pl.UInt32(),
    "fit": pl.String(),
    "role": pl.String(),
    "gain": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "n": pl.Int64(),
}


def document_draws(n: int, rng: np.random.Generator, draws: int = DRAWS) -> NDArray[np.float64]:
    """How often each of `n` documents is drawn with replacement: shape [n, 1 + draws].

    Column 0 has each document once, for the point estimate.
    """
    counts_KN = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return np.concatenate([np.ones((1, n)), counts_KN]).T


def drawn_gains(
    domains: Sequence[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]],
) -> NDArray[np.float64]:
    """Gain of P runs over their bases in each draw of documents, mean over domains.

    The gain on a domain is 100 (1 - sum nll_run / sum nll_base) percent: the relative drop in bits per byte,
    in which the bytes cancel because both runs score the same documents. It says nothing of how another
    training seed would have come out.

    Args:
        domains: of each, the losses in nats of the bases and of the runs, both [P, N] over the same N
            documents, and their draws [N, 1 + K].

    Returns:
        Percent, positive where the run needs fewer bits, shape [P, 1 + K]; column 0 is the point estimate.
    """
    gains_DPK = [100 * (1 - (runs_PN @ draws) / (bases_PN @ draws)) for bases_PN, runs_PN, draws in domains]
    mean_PK: NDArray[np.float64] = np.mean(gains_DPK, axis=0)
    return mean_PK


def percentile_interval(drawn_PK: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95% interval of each row, its point estimate in column 0 left out."""
    low_P, high_P = np.quantile(drawn_PK[:, 1:], [0.025, 0.975], axis=1)
    return low_P, high_P


def document_noise(results: Results, gains: Gains) -> pl.DataFrame:
    """Bootstrap interval over the test documents of every cell's gains, mean over its seeds.

    A run's base is the mean of its seed's untaught runs. Each draw takes, within each domain, as many
    documents as there are, with replacement, and the same ones for all runs.

    Returns:
        cell, fit, role, gain (point estimate), low, high (95%), n (documents).
    """
    pairs = gains.domains.select("cell", "run", "base_run").unique(maintain_order=True)
    roles = {domain.name: domain.role for domain in results.plan.domains}
    rows: list[tuple[object, ...]] = []
    twins = twins_of(results)
    for fit, losses in _LOSSES.items():
        tables = dict(_tables(results, losses, twins))
        for role in ("in_domain", "out_of_domain"):
            domains = [table for name, table in tables.items() if roles.get(name) == role]
            if domains:
                rows += [(cell, fit, role, *numbers) for cell, *numbers in _intervals(pairs, domains)]
    return pl.DataFrame(rows, _COLUMNS, orient="row")


Table = tuple[dict[str, int], "NDArray[np.float64]", dict[str, list[int]], "NDArray[np.float64]"]
"""Row of each run; losses [runs, documents]; of each base the rows whose mean it is; draws of the documents
[documents, 1 + draws]."""


def _tables(results: Results, losses: str, twins: pl.DataFrame) -> Iterator[tuple[str, Table]]:
    test = results.documents.filter(split="test").select("run", "domain", "document", losses).drop_nulls()
    for (domain,), rows in test.partition_by("domain", as_dict=True, maintain_order=True).items():
        ordered = rows.sort("run", "document")
        runs = ordered["run"].unique(maintain_order=True).to_list()
        losses_RN = ordered[losses].to_numpy().reshape(len(runs), -1)
        rng = np.random.default_rng(np.frombuffer(str(domain).encode(), dtype=np.uint8))
        places = {run: i for i, run in enumerate(runs)}
        bases: dict[str, list[int]] = {}
        for base, run in twins.iter_rows():
            if run in places:
                bases.setdefault(base, []).append(places[run])
        yield str(domain), (places, losses_RN, bases, document_draws(losses_RN.shape[1], rng))


def _intervals(pairs: pl.DataFrame, domains: list[Table]) -> Iterator[tuple[int, float, float, float, int]]:
    """(cell, mean, low, high, documents)."""
    n = sum(losses_RN.shape[1] for _, losses_RN, _, _ in domains)
    cells = pairs["cell"].unique(maintain_order=True)
    for start in range(0, len(cells), _CELLS_AT_ONCE):
        some = pairs.filter(pl.col("cell").is_in(cells[start : start + _CELLS_AT_ONCE].implode()))
        drawn_PK = drawn_gains(
            [
                (
                    np.stack([losses_RN[bases[run]].mean(axis=0) for run in some["base_run"]]),
                    losses_RN[[places[run] for run in some["run"]]],
                    draws_NK,
                )
                for places, losses_RN, bases, draws_NK in domains
            ]
        )
        first = some["cell"].to_numpy()
        starts = np.flatnonzero(np.r_[True, first[1:] != first[:-1]])
        seeds = np.diff(np.r_[starts, len(first)])
        means_CK = np.add.reduceat(drawn_PK, starts, axis=0) / seeds[:, None]
        numbers = zip(first[starts], means_CK[:, 0], *percentile_interval(means_CK), strict=True)
        yield from ((int(cell), float(m), float(low), float(high), n) for cell, m, low, high in numbers)


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
    return (
        results.runs.filter(pl.col("baseline").is_not_null())
        .unique(_CELL, keep="first", maintain_order=True)
        .with_columns(
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
