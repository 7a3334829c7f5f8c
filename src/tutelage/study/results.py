"""Read a study's result files into tables; files that cannot be read are reported and left out."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import polars as pl
from pydantic import Field

from tutelage.data.store_manifest import SCORED
from tutelage.errors import UserError
from tutelage.records import Record, UnreadableError, read_lines, read_model
from tutelage.run_directory import RunDirectory
from tutelage.study.plan import Plan, PlanRun, load_plan
from tutelage.study.score_tables import OTHERWISE, TASK_COLUMNS, Evaluations, read_evaluations
from tutelage.study.token_tables import TokenComparison, read_token_comparisons

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

PLANNED = pl.Schema(
    {
        "run": pl.String(),
        "kind": pl.String(),
        "group": pl.String(),
        "student": pl.String(),
        "teacher": pl.String(),
        "arm": pl.String(),
        "alpha": pl.Float64(),
        "constant": pl.Boolean(),
        "seed": pl.Int64(),
        "baseline": pl.String(),
        "stage": pl.String(),
        "teacher_run": pl.String(),
        "twin": pl.Int64(),
    }
)
"""Columns of `Results.runs` that a plan says, fields of `PlanRun`."""
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
_SEEN = {
    "overlap_documents": "{:.1%} of its {} documents were trained on; they are left out",
    "overlap_near_documents": "{:.1%} of its scored {} documents are copies of training text with changes",
    "teacher_overlap_documents": "{:.1%} of its {} documents were trained on by a teacher alone",
    "teacher_overlap_near_documents": "{:.1%} of its scored {} documents are copies, with changes, of text "
    "that a teacher alone was trained on",
}
"""Sentences about the shares of documents that were seen in training."""
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
    cohort: int = Field(1, ge=1)
    """Students that trained together."""
    evaluations: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Version of the scores of each domain, by evaluation id and domain."""
    warning: str | None = None


class _CurvePoint(Record):
    tokens: int
    ce: float


class Provenance(Record):
    """`provenance.json`: commit, versions and machine of a run."""

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
            "unreadable"; tokens, seconds (of a cohort, its share) and FLOPs are null unless done.
        scores: run, domain, split, metric, value, n, version; only runs with a whole evaluation by the plan's
            settings, at the last step that they were scored at. Of the planned domains, and of the probes
            "copying" and "recall".
        documents: run, domain, split, document, bytes, and losses in nats, sums over the document: nll, and
            with calibration fitted (null where it was not) nll_temperature, nll_unigram and
            nll_temperature_in_domain; the same runs.
        curves: run, tokens, ce (nats per token) of done runs.
        provenance: of done runs, by run id.
        token_comparisons: of its runs, as `tutelage eval tokens --output STUDY` leaves them there.
        problems: one sentence for each file that was left out, and why.
        warnings: one sentence for each reason to trust numbers less: texts trained on or not fitted.
        run_warnings: what runs were warned of, such as a held-out loss far from their training loss.
        tasks: run, task, metric, value, n (questions), version, summed_by (the group that has its score in
            its own): what the runs were asked by `tutelage eval tasks`, of each task the same questions.
    """

    plan: Plan
    runs: pl.DataFrame
    scores: pl.DataFrame
    documents: pl.DataFrame
    curves: pl.DataFrame
    provenance: Mapping[str, Provenance]
    token_comparisons: tuple[TokenComparison, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    run_warnings: tuple[str, ...] = ()
    tasks: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=TASK_COLUMNS))

    @property
    def unfinished(self) -> pl.DataFrame:
        """Planned runs that are not done."""
        return self.runs.filter(pl.col("status") != "done")


def load_results(directory: Path) -> Results:
    """Read the study in `directory`.

    Raises:
        UserError: there is no valid `plan.json`, or one from before plans said which scores they mean, or
            every text out of domain, or in domain, was trained on. Nothing else in the study is fatal.
    """
    plan = load_plan(directory)
    if any(planned.evaluation is None for planned in plan.runs):
        raise UserError(
            f"{directory / 'plan.json'}: by an older version, whose scores do not compare with today's; "
            f"`tutelage study run FILE --output {shlex.quote(str(directory))}` scores the runs again"
        )
    place, problems = directory / "runs", list[str]()
    rows: list[tuple[object, ...]] = []
    curves: dict[str, list[object]] = {name: [] for name in _CURVE_COLUMNS}
    provenance: dict[str, Provenance] = {}
    versions: dict[str, dict[str, str] | None] = {}
    warned: list[str] = []
    planned_row = attrgetter(*PLANNED)
    once = {teacher.name: teacher.run for teacher in plan.teachers}
    for planned in plan.runs:
        path = place / planned.run
        progress: dict[str, object] = {"status": "unreadable"}
        with _reported(problems, planned.run, ""):
            progress = _progress(path)
            versions[planned.run] = _versions(progress, planned)
            if warning := progress.get("warning"):
                warned.append(f"{planned.run}: {warning}")
        rows.append(planned_row(planned) + tuple(progress.get(name) for name in _MEASURED))
        if progress["status"] != "done":
            problems += _lost(path)
            continue
        with _reported(problems, planned.run, "; its learning curve is left out"):
            _add_curve(curves, planned.run, read_lines(path / "metrics.jsonl", _CurvePoint))
        with _reported(problems, planned.run, ""):
            provenance[planned.run] = read_model(path / "provenance.json", Provenance)
    runs = pl.DataFrame(rows, schema=PLANNED | _MEASURED, orient="row")
    done = runs.filter(status="done")["run"].to_list()
    found = read_evaluations(place, {run: versions[run] for run in done}, plan)
    problems += _left_out(found, directory)
    comparisons, damaged = read_token_comparisons(directory)
    _check_both_sides(plan, found)
    learned = pl.col("teacher_run").fill_null(pl.col("teacher").replace_strict(once, return_dtype=pl.String))
    return Results(
        plan=_as_scored(plan, found),
        runs=runs.with_columns(teacher_run=pl.when(pl.col("kind") != "teacher").then(learned)),
        scores=found.scores,
        documents=found.documents,
        curves=pl.DataFrame(curves, schema=_CURVE_COLUMNS),
        provenance=provenance,
        token_comparisons=comparisons,
        problems=(*problems, *damaged),
        warnings=(*_seen_texts(plan, found), *_unfitted_texts(plan, found)),
        run_warnings=tuple(warned),
        tasks=found.tasks,
    )


def _add_curve(curves: Mapping[str, list[object]], run: str, points: Sequence[_CurvePoint]) -> None:
    curves["run"] += [run] * len(points)
    curves["tokens"] += [point.tokens for point in points]
    curves["ce"] += [point.ce for point in points]


def _versions(progress: Mapping[str, object], planned: PlanRun) -> dict[str, str] | None:
    """Version by domain of the scores with the plan's settings; None if the run has none."""
    evaluations: dict[str, dict[str, str]] = progress.get("evaluations", {})  # type: ignore[assignment]
    return evaluations.get(str(planned.evaluation))


def _check_both_sides(plan: Plan, found: Evaluations) -> None:
    """Raise `UserError` if nothing is left to score students on, in the training distribution or outside."""
    students = [run.run for run in plan.runs if run.kind != "teacher"]
    some = found.scores.filter(pl.col("run").is_in(students), metric="bits_per_byte", split="test")
    for role, side, remedy in (
        ("out_of_domain", "out of domain", "add a domain of other text to the study file"),
        ("in_domain", "in domain", "its text repeats itself; drop what is in it twice"),
    ):
        names = [domain.name for domain in _as_scored(plan, found).domains if domain.role == role]
        if some.height and not some["domain"].is_in(names).any():
            raise UserError(
                f"study {plan.name}: every test document of {', '.join(names)} was trained on, so nothing "
                f"{side} is scored; {remedy}"
            )


def _as_scored(plan: Plan, found: Evaluations) -> Plan:
    """The plan with domains in domain that the students were trained on, as long as another one is left."""
    inside = {*_inside(plan, found), plan.in_domain}
    if all(domain.name in inside for domain in plan.domains):
        return plan
    domains = [
        domain.model_copy(update={"role": "in_domain"}) if domain.name in inside else domain
        for domain in plan.domains
    ]
    return plan.model_copy(update={"domains": tuple(domains)})


def _inside(plan: Plan, found: Evaluations, stage: str | None = None) -> list[str]:
    """Domains that some untaught student, or a run of a stage, was trained on text of, by its scores."""
    kind = "baseline" if stage is None else "after"
    some = [run.run for run in plan.runs if run.kind == kind and run.stage == stage]
    rows = found.roles.filter(pl.col("run").is_in(some), pl.col("role") == "in_domain")
    return rows["domain"].unique(maintain_order=True).to_list()


def _seen_texts(plan: Plan, found: Evaluations) -> list[str]:
    """Sentences about domains of which students, or their teachers alone, were trained on documents.

    Shares are those of the run with the most, and of a stage where it adds to them.
    """
    stage_of = {run.run: run.stage or "" for run in plan.runs if run.kind != "teacher"}
    shares = found.scores.filter(pl.col("run").is_in([*stage_of]), pl.col("metric").is_in([*_SEEN]))
    shares = shares.with_columns(stage=pl.col("run").replace_strict(stage_of, return_dtype=pl.String))
    most = shares.group_by("domain", "metric", "split", "stage").agg(pl.col("value").max())
    known = {tuple(keys): share for *keys, share in most.iter_rows()}
    inside = {*_inside(plan, found)}
    of_stage = {stage: _inside(plan, found, stage) for stage in sorted({*stage_of.values()} - {""})}
    sentences = []
    for domain in plan.domains:
        for metric, text in _SEEN.items():
            for split in SCORED:
                of = {stage: known.get((domain.name, metric, split, stage), 0.0) for stage in ("", *of_stage)}
                told = {stage: share for stage, share in of.items() if share > (of[""] if stage else 0)}
                sentences += [
                    f"{domain.name}{stage and f', then {stage}'}: {text.format(share, split)}"
                    for stage, share in told.items()
                ]
        if domain.role == "in_domain":
            continue
        if domain.name in inside:
            sentences.append(
                f"{domain.name}: planned as out of domain, but it is of the training text's kind"
            )
            continue
        sentences += [
            f"{domain.name}, then {stage}: counts as out of domain, but {stage} trains on text of its kind"
            for stage, texts in of_stage.items()
            if domain.name in texts
        ]
    return sentences


def _unfitted_texts(plan: Plan, found: Evaluations) -> list[str]:
    """Sentences about texts that students are scored on raw alone, while other texts were fitted too.

    A mean of fitted gains is then over fewer texts than the raw one beside it.
    """
    stage_of = {run.run: run.stage or "" for run in plan.runs if run.kind != "teacher"}
    scores = found.scores.filter(pl.col("run").is_in([*stage_of]), split="test")
    scores = scores.with_columns(stage=pl.col("run").replace_strict(stage_of, return_dtype=pl.String))
    raw = scores.filter(metric="bits_per_byte").select("run", "stage", "domain")
    fitted = scores.filter(metric="bits_per_byte_unigram").select("run", "stage", "domain")
    lacking = raw.join(fitted, on=["run", "domain"], how="anti").join(fitted, on="stage", how="semi")
    known = set(lacking.select("domain", "stage").iter_rows())
    stages = sorted({*stage_of.values()})
    return [
        f"{domain.name}{stage and f', then {stage}'}: no validation documents are left to fit calibration "
        "on, so it counts in raw gains and in no fitted ones, whose means are of fewer texts"
        for domain in plan.domains
        for stage in stages
        if (domain.name, stage) in known
    ]


def _left_out(found: Evaluations, directory: Path) -> list[str]:
    """One sentence for each run that is left out; one for all that were scored otherwise than planned.

    And one for each text and task on which a run does not compare with the others.
    """
    reasons = found.left_out
    others = [run for run, reason in reasons.items() if reason == OTHERWISE]
    sentences = [
        f"{run}: {reason}; its scores are left out" for run, reason in reasons.items() if reason != OTHERWISE
    ]
    if others:
        more = f" and {len(others) - 1} more runs" if len(others) > 1 else ""
        sentences.append(
            f"{others[0]}{more}: {OTHERWISE}, and such scores do not compare; they are left out until "
            f"`tutelage study run FILE --output {shlex.quote(str(directory))}` has scored them again"
        )
    return [
        *sentences,
        *(
            f"{run}: scored on other documents or settings of {domain} than the students; left out there"
            for run, domain in found.teachers
        ),
        *found.asked_otherwise,
    ]


@contextlib.contextmanager
def _reported(problems: list[str], run: str, consequence: str) -> Iterator[None]:
    """Add an unreadable file to `problems` and continue."""
    try:
        yield
    except UnreadableError as error:
        problems.append(f"{run}: {error}{consequence}")


def _progress(path: Path) -> dict[str, object]:
    """Status of a run and, if it is done, its costs.

    Raises:
        UnreadableError: the state cannot be read.
    """
    run, file = RunDirectory(path), path / "state.json"
    status = run.status()
    if status == "not started" and not run.scores.exists():
        return {"status": status}
    if status == "done":
        done = read_model(file, _Done)
        # Each run of a cohort counts the seconds of all, who took turns.
        share = {
            "seconds": done.seconds / done.cohort,
            "tokens_per_second": done.tokens_per_second * done.cohort,
        }
        return done.model_dump() | share
    return read_model(file, _Status).model_dump() | {"status": status}


def _lost(path: Path) -> list[str]:
    """A sentence about what a run has lost since its state said that it was done."""
    run = RunDirectory(path)
    if run.is_done() or run.state().get("status") != "done":
        return []
    lost = run.model if run.scores.exists() else run.scores
    return [f"{run.id}: {lost.name}: lost since the run was done; `tutelage study run` makes it again"]
