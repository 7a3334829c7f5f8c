"""Scores and document losses of many runs, checked for completeness and against each other, in bulk.

The evaluation of a run (`scores.jsonl` and `documents.parquet`) counts whole or not at all: with one domain
missing, its mean over domains would be the mean of other domains than everyone else's.
"""

from __future__ import annotations

import math
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

import polars as pl

from tutelage.study.records import UnreadableError, read_lines
from tutelage.types import COPYING, SCORING_VERSION, Score, scoring_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tutelage.study.planfile import Plan

SCORE_COLUMNS = pl.Schema(
    {
        "run": pl.String,
        "domain": pl.String,
        "split": pl.String,
        "metric": pl.String,
        "value": pl.Float64,
        "n": pl.Int64,
        "version": pl.String,
    }
)
_FITTED = ("nll_temperature", "nll_unigram")
DOCUMENT_COLUMNS = pl.Schema(
    {
        "run": pl.String,
        "domain": pl.String,
        "split": pl.String,
        "document": pl.Int64,
        "bytes": pl.Int64,
        "nll": pl.Float64,
        "nll_temperature": pl.Float64,
        "nll_unigram": pl.Float64,
    }
)
_BEHIND = {
    "bits_per_byte": "nll",
    "bits_per_byte_temperature": "nll_temperature",
    "bits_per_byte_unigram": "nll_unigram",
}
"""The documents' column that each of these scores is the sum of."""
_AGREEMENT = 1e-6
"""Largest relative difference between a score and the documents behind it: rounding, no more."""
_FILES_AT_ONCE = 250
_KEYS = ["run", "domain", "split"]


def read_evaluations(
    directory: Path, runs: Sequence[str], plan: Plan
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, str]]:
    """The whole evaluations among those of `runs`.

    Args:
        directory: of the run directories.
        runs: run ids, all done.
        plan: says which domains each run is to be scored on.

    Returns:
        Scores (of the last step that a run was scored at), document losses, and for every run that is in
        neither the reason.
    """
    problems: dict[str, str] = {}
    scores = _scores(directory, runs, problems)
    documents = _documents(directory, [run for run in runs if run not in problems], problems)
    asked = [domain.name for domain in plan.domains]  # others: `tutelage eval`
    scores = scores.filter(pl.col("domain").is_in([*asked, COPYING]))
    documents = documents.filter(pl.col("domain").is_in(asked))
    for run, reason in _gaps(scores, documents, plan) + _disagreements(scores, documents):
        problems.setdefault(run, reason)
    good = ~pl.col("run").is_in([*problems])
    scores, documents = scores.filter(good), documents.filter(good)
    for run in _odd_ones(scores, documents):
        problems[run] = "scored on other text or settings than most runs"
    good = ~pl.col("run").is_in([*problems])
    return scores.filter(good), documents.filter(good), problems


def _scores(directory: Path, runs: Sequence[str], problems: dict[str, str]) -> pl.DataFrame:
    """The latest score of each domain, split and metric: a run scored again appends its new rows."""
    names = [*SCORE_COLUMNS.names(), "step"]
    row = attrgetter(*names)
    rows: list[tuple[object, ...]] = []
    for run in runs:
        try:
            found = _made_alike(read_lines(directory / run / "scores.jsonl", Score))
            _check_lines(run, found)
        except UnreadableError as error:
            problems[run] = str(error)
        else:
            rows += map(row, found)
    columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
    frame = pl.DataFrame(columns, schema=SCORE_COLUMNS | {"step": pl.Int64()})
    return (
        frame.filter(pl.col("step") == pl.col("step").max().over("run"))
        .drop("step")
        .unique([*_KEYS, "metric"], keep="last")
        .sort(*_KEYS, "metric")
    )


def _made_alike(scores: Sequence[Score]) -> list[Score]:
    """The scores that this version's scoring made; others do not compare with them."""
    made = [score for score in scores if scoring_version(score.version) == SCORING_VERSION]
    if scores and not made:
        raise UnreadableError(
            f"scores.jsonl: all scores are by scoring version {scoring_version(scores[-1].version)}, this is "
            f"version {SCORING_VERSION}; `tutelage study run` scores the run again"
        )
    return made


def _check_lines(run: str, scores: Sequence[Score]) -> None:
    for number, score in enumerate(scores, start=1):
        if score.run != run:
            raise UnreadableError(f"scores.jsonl, line {number}: belongs to run {score.run}")
        if not (math.isfinite(score.value) and (score.value > 0 or score.metric not in _BEHIND)):
            raise UnreadableError(f"scores.jsonl, line {number}: the value is {score.value}")


def _documents(directory: Path, runs: Sequence[str], problems: dict[str, str]) -> pl.DataFrame:
    frames = []
    for start in range(0, len(runs), _FILES_AT_ONCE):
        some = runs[start : start + _FILES_AT_ONCE]
        try:
            frames.append(_read(directory, some))
        except (OSError, pl.exceptions.PolarsError):
            frames += _one_by_one(directory, some, problems)
    documents = pl.concat(frames) if frames else pl.DataFrame(schema=DOCUMENT_COLUMNS)
    for run, reason in _wrong_rows(documents):
        problems.setdefault(run, f"documents.parquet: {reason}")
    return documents


def _read(directory: Path, runs: Sequence[str]) -> pl.DataFrame:
    """Several files at once, ten times faster than one after another."""
    paths = [directory / run / "documents.parquet" for run in runs]
    frame = pl.scan_parquet(paths, include_file_paths="run", glob=False).collect()
    names = pl.DataFrame(
        {"run": [str(path) for path in paths], "name": runs}, schema_overrides={"name": pl.String}
    )
    absent = [pl.lit(None).alias(name) for name in _FITTED if name not in frame.columns]
    return (
        frame.with_columns(*absent)
        .join(names, on="run", how="left")
        .with_columns(run="name")
        .select(DOCUMENT_COLUMNS.names())
        .cast(DOCUMENT_COLUMNS)
    )


def _one_by_one(directory: Path, runs: Sequence[str], problems: dict[str, str]) -> list[pl.DataFrame]:
    frames = []
    for run in runs:
        try:
            frames.append(_read(directory, [run]))
        except FileNotFoundError:
            problems[run] = "documents.parquet: no such file"
        except (OSError, pl.exceptions.PolarsError) as error:
            problems[run] = f"documents.parquet: {' '.join(str(error).split())[:200]}"
    return frames


def _wrong_rows(documents: pl.DataFrame) -> list[tuple[str, str]]:
    """(run, reason) for losses that are no numbers and for documents that are there twice."""
    needed = [name for name in DOCUMENT_COLUMNS.names() if name not in _FITTED]
    broken = pl.any_horizontal(pl.col(needed).is_null(), ~pl.col("nll", *_FITTED).is_finite())
    lost = documents.filter(broken.fill_null(value=False))["run"].unique().to_list()
    twice = documents.select(*_KEYS, "document").is_duplicated()
    return [
        *((run, "a loss or a key is missing or not finite") for run in lost),
        *((run, "a document appears twice") for run in documents.filter(twice)["run"].unique()),
    ]


def _gaps(scores: pl.DataFrame, documents: pl.DataFrame, plan: Plan) -> list[tuple[str, str]]:
    """(run, reason) for every planned domain and split without a score or without documents."""
    cells = [(domain.name, split) for domain in plan.domains for split in ("validation", "test")]
    wanted = pl.DataFrame(cells, schema=["domain", "split"], orient="row")
    gaps = []
    for there, runs, text in (
        (scores.filter(metric="bits_per_byte"), scores, "scores.jsonl: no bits_per_byte of {0} ({1})"),
        (documents, documents, "documents.parquet: no documents of {0} ({1})"),
    ):
        missing = (
            runs.select("run").unique().join(wanted, how="cross").join(there, on=_KEYS, how="anti")
        ).unique("run", keep="first", maintain_order=True)
        gaps += [(run, text.format(domain, split)) for run, domain, split in missing.rows()]
    return gaps


def _disagreements(scores: pl.DataFrame, documents: pl.DataFrame) -> list[tuple[str, str]]:
    """(run, reason) where a score is not what its documents add up to."""
    sums = [pl.col(name).sum() / math.log(2) / pl.col("bytes").sum() for name in _BEHIND.values()]
    behind = (
        documents.group_by(_KEYS)
        .agg(sums)
        .rename({column: metric for metric, column in _BEHIND.items()})
        .unpivot(index=_KEYS, variable_name="metric", value_name="expected")
    )
    wrong = (
        scores.join(behind, on=[*_KEYS, "metric"])
        .filter(((pl.col("value") / pl.col("expected")) - 1).abs().fill_nan(1.0) > _AGREEMENT)
        .unique("run", keep="first", maintain_order=True)
    )
    problem = (
        "scores.jsonl says {value:.6g} bits per byte for {domain} ({split}), "
        "documents.parquet says {expected:.6g} ({metric})"
    )
    return [(row["run"], problem.format(**row)) for row in wrong.iter_rows(named=True)]


def _odd_ones(scores: pl.DataFrame, documents: pl.DataFrame) -> list[str]:
    """Runs that were scored on other texts or with other settings than most."""
    known = scores.filter(pl.col("metric").str.starts_with("bits_per_byte"))
    versions = _fingerprints(known.select(*_KEYS, "metric", "version"))
    texts = _fingerprints(documents.select(*_KEYS, "document", "bytes"))
    both = versions.join(texts, on="run")
    identities = {run: (version, text) for run, version, text in both.iter_rows()}
    if not identities:
        return []
    usual = Counter(identities.values()).most_common(1)[0][0]
    return [run for run, identity in identities.items() if identity != usual]


def _fingerprints(rows: pl.DataFrame) -> pl.DataFrame:
    """(run, sum): equal where all other columns hold the same rows, in any order."""
    hashes = rows.drop("run").hash_rows(seed=0)
    return rows.select("run", sum=hashes).group_by("run", maintain_order=True).agg(pl.col("sum").sum())
