"""Measure gains of students over the runs they are compared with, as tables.

A gain is in percent of the bits per byte of the run named by the plan, of the same seed; positive is better
(fewer bits). Where a seed has several untaught runs (`baselines` in a study file) it is in percent of their
mean. The out-of-domain gain is the mean of the domains' gains.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import polars as pl

from tutelage.analysis.stats import TextSpread, half_width, text_spread
from tutelage.bootstrap import DRAWS
from tutelage.study.score_tables import BEHIND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from tutelage.study.results import Results

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


class DrawnDomain(NamedTuple):
    """Losses in nats of runs on the N documents of one domain, those of their bases, and draws of these.

    Attributes:
        runs_PN: of the runs.
        bases_BK: sums of the bases' losses in each draw, each base once.
        base_P: row of each run's base in `bases_BK`.
        draws_NK: how often each draw has each document.
    """

    runs_PN: NDArray[np.float64]
    bases_BK: NDArray[np.float64]
    base_P: NDArray[np.intp]
    draws_NK: NDArray[np.float64]


def drawn_gains(domains: Sequence[DrawnDomain]) -> NDArray[np.float64]:
    """Gain of P runs over their bases in each draw of documents, mean over domains.

    The gain on a domain is 100 (1 - sum nll_run / sum nll_base) percent: the relative drop in bits per byte,
    in which the bytes cancel because both runs score the same documents. It says nothing of how another
    training seed would have come out.

    Args:
        domains: of the same P runs.

    Returns:
        Percent, positive where the run needs fewer bits, shape [P, K]; column 0 is the point estimate.
    """
    total_PK = np.zeros((len(domains[0].runs_PN), domains[0].draws_NK.shape[1]))
    for one in domains:
        gains_PK = one.runs_PN @ one.draws_NK  # in place from here: fresh memory costs more than arithmetic
        for gains_K, base in zip(gains_PK, one.base_P, strict=True):
            np.divide(gains_K, one.bases_BK[base], out=gains_K)
        np.subtract(1, gains_PK, out=gains_PK)
        gains_PK *= 100
        total_PK += gains_PK
    total_PK /= len(domains)
    return total_PK


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
    test = gains.domains.filter(split="test").join(
        gains.cells.select("cell", "stage"), on="cell", maintain_order="left"
    )
    rows: list[tuple[object, ...]] = []
    twins = twins_of(results)
    draws_of = functools.cache(_draws_of)  # every fit, role and group of runs asks for the same ones
    for fit, metric in _METRICS.items():
        losses = BEHIND[metric]
        known = results.documents.filter(pl.col(losses).is_not_null(), split="test")
        scored = test.filter(fit=fit).join(known, on=["run", "domain"], how="semi", maintain_order="left")
        for role in ("in_domain", "out_of_domain"):
            for pairs, texts in _alike(scored.filter(role=role)):
                domains = [
                    _document_losses(results, losses, domain.name, pairs, twins, draws_of)
                    for domain in results.plan.domains
                    if domain.name in texts
                ]
                rows += [(cell, fit, role, *numbers) for cell, *numbers in _intervals(pairs, domains)]
    return pl.DataFrame(rows, _COLUMNS, orient="row")


def _alike(rows: pl.DataFrame) -> Iterator[tuple[pl.DataFrame, frozenset[str]]]:
    """Runs with their bases, of one stage and scored on the same texts: they share all documents.

    What was trained on is left out, so runs of another stage may lack documents, or a text.
    """
    of_all = pl.len().over("cell", "domain") == pl.col("run").n_unique().over("cell")
    texts = rows.filter(of_all).group_by("cell", "stage", maintain_order=True).agg(pl.col("domain").unique())
    groups: dict[tuple[str | None, frozenset[str]], list[int]] = {}
    for cell, stage, names in texts.iter_rows():
        groups.setdefault((stage, frozenset(names)), []).append(cell)
    for (_, names), cells in groups.items():
        some = rows.filter(pl.col("cell").is_in(cells))
        yield some.select("cell", "run", "base_run").unique(maintain_order=True), names


class _DocumentLosses(NamedTuple):
    """Losses of the documents of one domain.

    Attributes:
        runs: row of each run in `runs_RN`.
        runs_RN: losses.
        bases: row of each base in `bases_BK`.
        bases_BK: sums of their losses in each draw, means over the base's twins.
        draws_NK: how often each draw has each document.
    """

    runs: dict[str, int]
    runs_RN: NDArray[np.float64]
    bases: dict[str, int]
    bases_BK: NDArray[np.float64]
    draws_NK: NDArray[np.float64]


def _document_losses(
    results: Results,
    losses: str,
    text: str,
    pairs: pl.DataFrame,
    twins: pl.DataFrame,
    draws_of: Callable[[str, int], NDArray[np.float64]],
) -> _DocumentLosses:
    bases = twins.filter(pl.col("base_run").is_in(pairs["base_run"].implode()))
    compared = pl.col("run").is_in([*pairs["run"], *bases["run"]])
    rows = results.documents.filter(compared, domain=text, split="test").sort("run", "document")
    ordered = rows.select("run", losses).drop_nulls()
    names = ordered["run"].unique(maintain_order=True).to_list()
    runs_RN = ordered[losses].to_numpy().reshape(len(names), -1)
    runs = {run: i for i, run in enumerate(names)}
    twins_at: dict[str, list[int]] = {}
    for base, run in bases.iter_rows():
        if run in runs:
            twins_at.setdefault(base, []).append(runs[run])
    bases_BN = np.stack([runs_RN[places].mean(axis=0) for places in twins_at.values()])
    draws_NK = draws_of(text, runs_RN.shape[1])
    base_at = {base: i for i, base in enumerate(twins_at)}
    return _DocumentLosses(runs, runs_RN, base_at, bases_BN @ draws_NK, draws_NK)


def _draws_of(text: str, n: int) -> NDArray[np.float64]:
    """Draws of the `n` documents of a text, which are the same wherever it has so many."""
    return document_draws(n, np.random.default_rng(np.frombuffer(text.encode(), dtype=np.uint8)))


def _intervals(
    pairs: pl.DataFrame, domains: Sequence[_DocumentLosses]
) -> Iterator[tuple[int, float, float, float, int]]:
    """(cell, mean, low, high, documents)."""
    n = sum(len(one.draws_NK) for one in domains)
    cell_P = pairs["cell"].to_numpy()
    starts_C = np.flatnonzero(np.r_[True, cell_P[1:] != cell_P[:-1]])
    ends_C = np.r_[starts_C[1:], len(cell_P)]
    places = [
        (
            np.array([one.bases[run] for run in pairs["base_run"]]),
            np.array([one.runs[run] for run in pairs["run"]]),
        )
        for one in domains
    ]
    for first in range(0, len(starts_C), _CELLS_AT_ONCE):
        starts, ends = starts_C[first : first + _CELLS_AT_ONCE], ends_C[first : first + _CELLS_AT_ONCE]
        some = slice(starts[0], ends[-1])
        drawn_PK = drawn_gains(
            [
                DrawnDomain(one.runs_RN[runs_P[some]], one.bases_BK, bases_P[some], one.draws_NK)
                for one, (bases_P, runs_P) in zip(domains, places, strict=True)
            ]
        )
        means_CK = np.add.reduceat(drawn_PK, starts - starts[0], axis=0) / (ends - starts)[:, None]
        numbers = zip(cell_P[starts], means_CK[:, 0], *percentile_interval(means_CK), strict=True)
        yield from ((int(cell), float(m), float(low), float(high), n) for cell, m, low, high in numbers)


Fit = Literal["raw", "temperature", "unigram", "temperature_in_domain"]
Side = Literal["in_domain", "out_of_domain"]

_METRICS: dict[Fit, str] = {
    "raw": "bits_per_byte",
    "temperature": "bits_per_byte_temperature",
    "unigram": "bits_per_byte_unigram",
    "temperature_in_domain": "bits_per_byte_temperature_in_domain",
}
_CELL = ["student", "teacher", "arm", "stage"]


@dataclass(frozen=True, eq=False)
class Gains:
    """Every finished comparison.

    Attributes:
        cells: one row per student setting, teacher, arm and stage that has one: cell (its number, in the
            report's order), student, teacher, arm, stage, alpha, control (true of teachers without context
            and of students without a teacher), constant (whether the arm is alpha alone), pair
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
    cells = cells.join(domains, on="cell", how="semi")
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
    students = [student.name for student in results.plan.students]
    teachers = [teacher.name for teacher in results.plan.teachers]
    controls = [teacher.name for teacher in results.plan.teachers if teacher.control]
    # Places by Enum, since `replace_strict` refuses a plan without students.
    return (
        results.runs.filter(pl.col("baseline").is_not_null())
        .unique(_CELL, keep="first", maintain_order=True)
        .with_columns(
            control=pl.col("teacher").is_in(controls).fill_null(value=True),
            place=pl.col("student").cast(pl.Enum(students)).to_physical().cast(pl.Int64),
            teacher_place=pl.col("teacher")
            .cast(pl.Enum(teachers), strict=False)
            .to_physical()
            .cast(pl.Int64)
            .fill_null(len(teachers)),
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
        .select(*_CELL, "alpha", "control", "constant")
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


def roles_of(results: Results) -> pl.DataFrame:
    """The scored texts: domain, role."""
    return pl.DataFrame([(d.name, d.role) for d in results.plan.domains], ["domain", "role"], orient="row")


def base_scores(results: Results) -> pl.DataFrame:
    """Scores of what runs are compared with, means over twins: base_run, domain, split, metric, value."""
    return (
        twins_of(results)
        .join(results.scores, on="run")
        .group_by("base_run", "domain", "split", "metric")
        .agg(pl.col("value").mean())
    )


def _by_domain(results: Results, cells: pl.DataFrame) -> pl.DataFrame:
    fits = pl.DataFrame([*_METRICS.items()], ["fit", "metric"], orient="row")
    scored = (
        results.scores.join(fits, on="metric")
        .join(roles_of(results), on="domain")
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


def text_spreads(gains: Gains) -> dict[int, dict[Fit, TextSpread]]:
    """Spread over texts of the out-of-domain test gain of every cell and fit that has two texts, by cell.

    Only seeds with all texts count.
    """
    rows = gains.domains.filter(split="test", role="out_of_domain").sort("cell", "fit", "seed", "domain")
    group = ["cell", "fit"]
    texts = pl.col("domain").n_unique().over(group)
    whole = rows.with_columns(texts=texts).filter(
        pl.col("texts") > 1, pl.len().over(*group, "seed") == pl.col("texts")
    )
    shapes = whole.group_by(group, maintain_order=True).agg(
        pl.col("texts").first(), seeds=pl.len() // pl.col("texts").first(), values="gain"
    )
    found: dict[int, dict[Fit, TextSpread]] = {}
    for (n_seeds, n_texts), some in shapes.partition_by("seeds", "texts", as_dict=True).items():
        gains_CST = some["values"].explode().to_numpy().reshape(-1, n_seeds, n_texts)
        for cell, fit, spread in zip(some["cell"], some["fit"], text_spread(gains_CST), strict=True):
            found.setdefault(cell, {})[fit] = spread
    return found
