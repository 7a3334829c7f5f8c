"""A study's result files as tables. What cannot be read is reported and left out, never averaged in.

The evaluation of a run (`scores.jsonl` and `documents.parquet`) counts whole or not at all: with one
domain missing, its mean over domains would be the mean of other domains than everyone else's.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import polars as pl
from pydantic import TypeAdapter

from tutelage.study.planfile import Plan, load_plan
from tutelage.study.records import Record, UnreadableError, read_lines, read_model
from tutelage.types import Score

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Plan", "Provenance", "Results", "load_plan", "load_results"]

_RUN_COLUMNS = pl.Schema(
    {
        "run": pl.String,
        "kind": pl.String,
        "teacher": pl.String,
        "alpha": pl.Float64,
        "seed": pl.Int64,
        "status": pl.String,
        "error": pl.String,
        "tokens": pl.Int64,
        "seconds": pl.Float64,
        "tokens_per_second": pl.Float64,
        "parameters": pl.Int64,
        "train_flops": pl.Float64,
        "teacher_flops": pl.Float64,
    }
)
_SCORE_COLUMNS = pl.Schema(
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
_DOCUMENT_COLUMNS = pl.Schema(
    {
        "run": pl.String,
        "domain": pl.String,
        "split": pl.String,
        "document": pl.Int64,
        "bytes": pl.Int64,
        "nll": pl.Float64,
    }
)
_CURVE_COLUMNS = pl.Schema({"run": pl.String, "tokens": pl.Int64, "ce": pl.Float64})
_AGREEMENT = 1e-6
"""Largest relative difference between a score and the documents behind it: rounding, no more."""


class _Status(Record):
    status: Literal["running", "stopped", "done", "failed"]
    error: str | None = None


class _Ledger(Record):
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    train_flops: float
    teacher_flops: float


class _CurvePoint(Record):
    tokens: int
    ce: float


class Provenance(Record):
    """Where a run came from, as `provenance.json` says."""

    time: str
    command: str | list[str]
    commit: str | None
    dirty: bool | None = None
    versions: dict[str, str | None]
    device: str
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class Results:
    """Everything a study has measured so far.

    Attributes:
        plan: what was to be run.
        runs: one row for every planned run. `status` is done, running, stopped, failed, "not started" or
            "unreadable"; token counts, seconds and FLOPs are null unless it is done.
        scores: run, domain, split, metric, value, n, version; only runs with a whole evaluation.
        documents: run, domain, split, document, bytes, nll (nats, sum over the document); the same runs.
        curves: run, tokens, ce (nats per token) of done runs.
        provenance: of done runs, by run id.
        problems: one sentence for each file that was left out, and why.
    """

    plan: Plan
    runs: pl.DataFrame
    scores: pl.DataFrame
    documents: pl.DataFrame
    curves: pl.DataFrame
    provenance: Mapping[str, Provenance]
    problems: tuple[str, ...]

    @property
    def unfinished(self) -> pl.DataFrame:
        """Planned runs that are not done."""
        return self.runs.filter(pl.col("status") != "done")


def load_results(directory: Path) -> Results:
    """Read the study in `directory`.

    Raises:
        UserError: there is no valid `plan.json`. Nothing else in the study is fatal.
    """
    plan = load_plan(directory)
    problems: list[str] = []
    rows: list[dict[str, object]] = []
    evaluations: dict[str, tuple[pl.DataFrame, pl.DataFrame]] = {}
    curves: dict[str, pl.DataFrame] = {}
    provenance: dict[str, Provenance] = {}
    for planned in plan.runs:
        path = directory / plan.runs_directory / planned.run
        progress: dict[str, object] = {"status": "unreadable"}
        with _reported(problems, planned.run, ""):
            progress = _progress(path)
        rows.append(planned.model_dump() | progress)
        if progress["status"] != "done":
            continue
        with _reported(problems, planned.run, "; its scores are left out"):
            evaluations[planned.run] = _evaluation(path, plan)
        with _reported(problems, planned.run, "; its learning curve is left out"):
            curves[planned.run] = _curve(path)
        with _reported(problems, planned.run, ""):
            provenance[planned.run] = read_model(path / "provenance.json", Provenance)
    for run in _odd_ones({run: _identity(*frames) for run, frames in evaluations.items()}):
        del evaluations[run]
        problems.append(f"{run}: scored on other text or settings than most runs; its scores are left out")
    return Results(
        plan=plan,
        runs=pl.DataFrame(rows, schema=_RUN_COLUMNS),
        scores=_stack([scores for scores, _ in evaluations.values()], _SCORE_COLUMNS),
        documents=_stack([documents for _, documents in evaluations.values()], _DOCUMENT_COLUMNS),
        curves=_stack(list(curves.values()), _CURVE_COLUMNS),
        provenance=provenance,
        problems=tuple(problems),
    )


@contextlib.contextmanager
def _reported(problems: list[str], run: str, consequence: str) -> Iterator[None]:
    """Note what cannot be read, and go on."""
    try:
        yield
    except UnreadableError as error:
        problems.append(f"{run}: {error}{consequence}")


def _progress(path: Path) -> dict[str, object]:
    """Status of a run and, if it is done, its costs."""
    if not (path / "state.json").exists():
        return {"status": "not started"}
    status = read_model(path / "state.json", _Status)
    if status.status != "done":
        return status.model_dump()
    return status.model_dump() | read_model(path / "state.json", _Ledger).model_dump()


def _evaluation(path: Path, plan: Plan) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scores and document losses of one run, checked for completeness and against each other."""
    scores = _scores(path)
    documents = _documents(path)
    bits = scores.filter(pl.col("metric") == "bits_per_byte")
    values = {(row["domain"], row["split"]): row["value"] for row in bits.iter_rows(named=True)}
    sums = documents.group_by("domain", "split").agg(pl.col("bytes", "nll").sum())
    totals = {(row["domain"], row["split"]): row for row in sums.iter_rows(named=True)}
    for domain in plan.domains:
        for split in ("validation", "test"):
            key = (domain.name, split)
            if key not in values:
                raise UnreadableError(f"scores.jsonl: no bits_per_byte of {domain.name} ({split})")
            if key not in totals:
                raise UnreadableError(f"documents.parquet: no documents of {domain.name} ({split})")
            expected = totals[key]["nll"] / math.log(2) / totals[key]["bytes"]
            if not math.isclose(values[key], expected, rel_tol=_AGREEMENT):
                raise UnreadableError(
                    f"scores.jsonl says {values[key]:.6g} bits per byte for {domain.name} ({split}), "
                    f"documents.parquet says {expected:.6g}"
                )
    return scores, documents


def _scores(path: Path) -> pl.DataFrame:
    """The latest score of each domain, split and metric: a run scored again appends its new rows."""
    scores = read_lines(path / "scores.jsonl", TypeAdapter(Score))
    for number, score in enumerate(scores, start=1):
        if score.run != path.name:
            raise UnreadableError(f"scores.jsonl, line {number}: belongs to run {score.run}")
        if not (math.isfinite(score.value) and score.value > 0):
            raise UnreadableError(f"scores.jsonl, line {number}: the value is {score.value}")
    frame = pl.DataFrame([asdict(score) for score in scores]).select(_SCORE_COLUMNS.names())
    return frame.unique(["domain", "split", "metric"], keep="last").sort("domain", "split", "metric")


def _documents(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path / "documents.parquet")
        frame = (
            frame.with_columns(run=pl.lit(path.name))
            .select(_DOCUMENT_COLUMNS.names())
            .cast(_DOCUMENT_COLUMNS)
        )
    except FileNotFoundError:
        raise UnreadableError("documents.parquet: no such file") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UnreadableError(f"documents.parquet: {' '.join(str(error).split())[:200]}") from None
    if frame.null_count().sum_horizontal().item() or not frame["nll"].is_finite().all():
        raise UnreadableError("documents.parquet: a loss or a key is missing or not finite")
    if frame.select("domain", "split", "document").is_duplicated().any():
        raise UnreadableError("documents.parquet: a document appears twice")
    return frame.sort("domain", "split", "document")


def _curve(path: Path) -> pl.DataFrame:
    points = read_lines(path / "metrics.jsonl", TypeAdapter(_CurvePoint))
    frame = pl.DataFrame([point.model_dump() for point in points])
    return frame.with_columns(run=pl.lit(path.name)).select(_CURVE_COLUMNS.names()).cast(_CURVE_COLUMNS)


def _identity(scores: pl.DataFrame, documents: pl.DataFrame) -> Hashable:
    """What was scored: evaluation versions, and the documents with their sizes."""
    versions = scores.select("domain", "split", "metric", "version").rows()
    texts = documents.select("domain", "split", "document", "bytes")
    return tuple(versions), texts.hash_rows(seed=0).sum()


def _odd_ones(identities: Mapping[str, Hashable]) -> list[str]:
    """Runs whose identity is not the most common one."""
    usual = Counter(identities.values()).most_common(1)
    return [run for run, identity in identities.items() if identity != usual[0][0]]


def _stack(frames: list[pl.DataFrame], schema: pl.Schema) -> pl.DataFrame:
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)
