"""Evaluation noise of every cell: one paired bootstrap over documents, its draws shared by all runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tutelage.analysis.gains import twins_of
from tutelage.resampling import DRAWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from tutelage.analysis.gains import Gains
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
