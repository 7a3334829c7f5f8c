"""A study's result files as tables. What cannot be read is reported and left out, never averaged in."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import polars as pl

from tutelage.study.evaluations import read_evaluations
from tutelage.study.mechanisms import Mechanism, read_mechanisms
from tutelage.study.planfile import Plan, load_plan
from tutelage.study.records import Record, UnreadableError, read_lines, read_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Plan", "Provenance", "Results", "load_plan", "load_results"]

_PLANNED = {
    "run": pl.String(),
    "kind": pl.String(),
    "group": pl.String(),
    "student": pl.String(),
    "teacher": pl.String(),
    "arm": pl.String(),
    "alpha": pl.Float64(),
    "seed": pl.Int64(),
    "baseline": pl.String(),
    "stage": pl.String(),
    "teacher_run": pl.String(),
    "twin": pl.Int64(),
}
_MEASURED = {
    "status": pl.String(),
    "error": pl.String(),
    "tokens": pl.Int64(),
    "seconds": pl.Float64(),
    "tokens_per_second": pl.Float64(),
    "parameters": pl.Int64(),
    "train_flops": pl.Float64(),
    "teacher_flops": pl.Float64(),
}
_CURVE_COLUMNS = pl.Schema({"run": pl.String, "tokens": pl.Int64, "ce": pl.Float64})


class _Status(Record):
    status: Literal["running", "stopped", "done", "failed"]
    error: str | None = None


class _Done(_Status):
    status: Literal["done"]
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
        runs: one row for every planned run, with what the plan says of it; `teacher_run` is null where the
            study trained no teacher of it. `status` is done, running, stopped, failed, "not started" or
            "unreadable"; tokens, seconds and FLOPs are null unless done.
        scores: run, domain, split, metric, value, n, version; only runs with a whole evaluation, at the last
            step that they were scored at. Of the planned domains, and of the probe "copying".
        documents: run, domain, split, document, bytes, and losses in nats, sums over the document: nll, and
            nll_temperature and nll_unigram with calibration fitted (null where it was not); the same runs.
        curves: run, tokens, ce (nats per token) of done runs.
        provenance: of done runs, by run id.
        mechanisms: of its runs, as `tutelage eval --mechanism --output STUDY` leaves them there.
        problems: one sentence for each file that was left out, and why.
    """

    plan: Plan
    runs: pl.DataFrame
    scores: pl.DataFrame
    documents: pl.DataFrame
    curves: pl.DataFrame
    provenance: Mapping[str, Provenance]
    mechanisms: tuple[Mechanism, ...]
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
    place = directory / plan.runs_directory
    problems: list[str] = []
    rows: list[tuple[object, ...]] = []
    curves: list[tuple[str, int, float]] = []
    provenance: dict[str, Provenance] = {}
    planned_row = attrgetter(*_PLANNED)
    once = {teacher.name: teacher.run for teacher in plan.teachers}
    for planned in plan.runs:
        path = place / planned.run
        progress: dict[str, object] = {"status": "unreadable"}
        with _reported(problems, planned.run, ""):
            progress = _progress(path)
        rows.append(planned_row(planned) + tuple(progress.get(name) for name in _MEASURED))
        if progress["status"] != "done":
            continue
        with _reported(problems, planned.run, "; its learning curve is left out"):
            points = read_lines(path / "metrics.jsonl", _CurvePoint)
            curves += [(planned.run, point.tokens, point.ce) for point in points]
        with _reported(problems, planned.run, ""):
            provenance[planned.run] = read_model(path / "provenance.json", Provenance)
    runs = pl.DataFrame(rows, schema=_PLANNED | _MEASURED, orient="row")
    done = runs.filter(status="done")["run"].to_list()
    scores, documents, left_out = read_evaluations(place, done, plan)
    problems += [f"{run}: {reason}; its scores are left out" for run, reason in left_out.items()]
    mechanisms, damaged = read_mechanisms(directory)
    learned = pl.col("teacher_run").fill_null(pl.col("teacher").replace_strict(once, return_dtype=pl.String))
    return Results(
        plan=plan,
        runs=runs.with_columns(teacher_run=pl.when(pl.col("kind") != "teacher").then(learned)),
        scores=scores,
        documents=documents,
        curves=pl.DataFrame(curves, schema=_CURVE_COLUMNS, orient="row"),
        provenance=provenance,
        mechanisms=mechanisms,
        problems=(*problems, *damaged),
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
    file = path / "state.json"
    try:
        return read_model(file, _Done).model_dump()
    except UnreadableError:
        if not file.exists():
            return {"status": "not started"}
        status = read_model(file, _Status)
        if status.status == "done":
            raise
        return status.model_dump()
