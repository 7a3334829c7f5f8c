"""Read the scores and document losses of many runs in bulk, and check that they are complete and agree.

The evaluation of a run (`scores.jsonl` and `documents.parquet`) counts as a whole or not at all: with one
domain missing, its mean over domains would not compare with that of other runs.
"""

from __future__ import annotations

import math
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from tutelage.checksums import check_file
from tutelage.records import UnreadableError, read_lines
from tutelage.types import COPYING, RECALL, SCORING_VERSION, Score, scoring_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from tutelage.study.plan import Plan

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
OTHERWISE = "scored by other rules or settings than the plan's"
"""Reason for leaving out a run whose state.json lacks the plan's evaluation."""
_FITTED = ("nll_temperature", "nll_unigram", "nll_temperature_in_domain")
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
        "nll_temperature_in_domain": pl.Float64,
    }
)
TASK_COLUMNS = pl.Schema(
    {
        "run": pl.String,
        "task": pl.String,
        "metric": pl.String,
        "value": pl.Float64,
        "n": pl.Int64,
        "version": pl.String,
        "summed_by": pl.String,
    }
)
BEHIND = MappingProxyType(
    {
        "bits_per_byte": "nll",
        "bits_per_byte_temperature": "nll_temperature",
        "bits_per_byte_unigram": "nll_unigram",
        "bits_per_byte_temperature_in_domain": "nll_temperature_in_domain",
    }
)
"""Column of the documents that sums to each of these scores."""
_AGREEMENT = 1e-6
"""Largest relative difference, from rounding, between a score and the documents behind it."""
_FILES_AT_ONCE = 250
_KEYS = ["run", "domain", "split"]
_VERSION_KEYS = ["run", "domain", "version"]
_AT_THE_END = pl.col("step") == pl.col("step").max().over("run")


class Evaluations(NamedTuple):
    """The evaluations of many runs.

    Attributes:
        scores: of the last step at which a run was scored.
        documents: losses of documents; of the same runs.
        tasks: scores of downstream tasks, of the same runs, as `tutelage eval tasks` left them there.
        roles: run, domain, role: whether the run was trained on such text, as its scores say.
        left_out: for every run that is in neither, the reason.
        asked_otherwise: a sentence for each run whose scores of a task do not compare with the others'.
        teachers: teacher and domain of scores that are in neither because the students' are of other text or
            settings, for example because the teacher was trained on some of the documents.
    """

    scores: pl.DataFrame
    documents: pl.DataFrame
    tasks: pl.DataFrame
    roles: pl.DataFrame
    left_out: dict[str, str]
    asked_otherwise: list[str]
    teachers: list[tuple[str, str]]


def read_evaluations(
    directory: Path, versions: Mapping[str, Mapping[str, str] | None], plan: Plan
) -> Evaluations:
    """The complete evaluations of runs by the plan's settings; other scores in the files are ignored.

    Args:
        directory: of the run directories.
        versions: of runs that are done, the version of the scores that the plan means, by domain; None for a
            run that was not scored so.
        plan: says which domains each run is to be scored on.
    """
    problems = {run: OTHERWISE for run, known in versions.items() if known is None}
    own = _own_versions(versions, plan)
    rows = _rows(directory, [run for run in versions if run not in problems], problems)
    scores = _of_versions(rows, own)
    runs = [run for run in versions if run not in problems]
    documents = _documents(directory, runs, own, problems)
    runs = [run for run in runs if run not in problems]
    for run, reason in _gaps(runs, scores, documents, plan) + _disagreements(scores, documents):
        problems.setdefault(run, reason)
    good = ~pl.col("run").is_in([*problems])
    scores, documents = scores.filter(good), documents.filter(good)
    odd = _odd_ones(scores, documents, plan)
    teachers = odd.filter(kind="teacher")
    for run, domain in odd.filter(pl.col("kind") != "teacher").select("run", "domain").iter_rows():
        problems.setdefault(run, f"scored on other text or settings than most runs, of {domain}")
    good = ~pl.col("run").is_in([*problems])
    scores, documents = (
        rows.filter(good).join(teachers, on=["run", "domain"], how="anti", maintain_order="left")
        for rows in (scores, documents)
    )
    answers = rows.filter(~pl.col("run").is_in([*problems]), _AT_THE_END, role="downstream")
    tasks, asked_otherwise = _asked_alike(answers.rename({"domain": "task"}).select(*TASK_COLUMNS))
    return Evaluations(
        scores=scores.drop("role"),
        documents=documents,
        tasks=tasks,
        roles=scores.select("run", "domain", "role").unique(maintain_order=True),
        left_out=problems,
        asked_otherwise=asked_otherwise,
        teachers=[*teachers.select("run", "domain").iter_rows()],
    )


def _own_versions(versions: Mapping[str, Mapping[str, str] | None], plan: Plan) -> pl.DataFrame:
    """run, domain, version of the scores that the plan means."""
    asked = {domain.name for domain in plan.domains}
    rows = [
        (run, domain, version)
        for run, known in versions.items()
        for domain, version in (known or {}).items()
        if domain in asked
    ]
    return pl.DataFrame(rows, dict.fromkeys(_VERSION_KEYS, pl.String()), orient="row")


def _rows(directory: Path, runs: Sequence[str], problems: dict[str, str]) -> pl.DataFrame:
    """The scores of runs by this scoring version, of every text, probe and task."""
    schema = SCORE_COLUMNS | {"summed_by": pl.String(), "role": pl.String(), "step": pl.Int64()}
    columns: dict[str, list[object]] = {name: [] for name in schema}
    fields = {name: attrgetter(name) for name in schema}
    for run in runs:
        try:
            path = directory / run / "scores.jsonl"
            found = read_lines(path, Score)
            check_file(path)
            check_file(path.with_name("documents.parquet"))
            found = _made_alike(found)
            _check_lines(run, found)
        except UnreadableError as error:
            problems[run] = str(error)
        else:
            for name, field in fields.items():
                columns[name] += map(field, found)
    return pl.DataFrame(columns, schema=schema)


def _of_versions(rows: pl.DataFrame, own: pl.DataFrame) -> pl.DataFrame:
    """The scores of `own` versions, and the latest ones of probes, of any version."""
    rows = rows.filter(pl.col("role") != "downstream")  # whose tasks may be called as a text or probe is
    rows = rows.drop("summed_by")  # of tasks alone
    probed = rows.filter(pl.col("domain").is_in([COPYING, RECALL]))
    frame = pl.concat([rows.join(own, on=_VERSION_KEYS, how="semi", maintain_order="left"), probed])
    return (
        frame.filter(_AT_THE_END).drop("step").unique([*_KEYS, "metric"], keep="last").sort(*_KEYS, "metric")
    )


def _asked_alike(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The scores of each task in the version that most runs have; of several such, the one of more questions.

    Of equals the last one, because a task file that was mended is asked again as often as before.

    Args:
        rows: scores of role "downstream", of each run those after its last step, as `TASK_COLUMNS` has them.

    Returns:
        Finite ones of them; and a sentence for each run that was asked other questions of a task.
    """
    usual = (
        rows.reverse()
        .group_by("task", "version", maintain_order=True)
        .agg(runs=pl.col("run").n_unique(), n=pl.col("n").max())
        .sort("runs", "n", descending=True, maintain_order=True)
        .unique("task", keep="first", maintain_order=True)
    )
    found = rows.join(usual, on=["task", "version"], how="semi", maintain_order="left")
    return found.filter(pl.col("value").is_finite()), [*_otherwise(rows, found)]


def _otherwise(rows: pl.DataFrame, found: pl.DataFrame) -> Iterator[str]:
    some = rows.join(found, on=["run", "task"], how="anti").unique(["run", "task"], maintain_order=True)
    for run, task in some.select("run", "task").iter_rows():
        yield f"{run}: asked other questions of {task} than most runs, or in another way; left out there"


def _made_alike(scores: Sequence[Score]) -> list[Score]:
    """The scores of this scoring version; others do not compare with them."""
    versions = {score.version for score in scores}
    current = {version for version in versions if scoring_version(version) == SCORING_VERSION}
    made = [score for score in scores if score.version in current]
    if scores and not made:
        raise UnreadableError(
            "scores.jsonl",
            f"all scores are by scoring version {scoring_version(scores[-1].version)}, this is "
            f"version {SCORING_VERSION}; `tutelage study run` scores the run again",
        )
    return made


def _check_lines(run: str, scores: Sequence[Score]) -> None:
    for number, score in enumerate(scores, start=1):
        if score.run != run:
            raise UnreadableError(f"scores.jsonl, line {number}", f"belongs to run {score.run}")
        if score.role == "downstream":  # whose metrics are lm-eval's, and may be anything
            continue
        if not (math.isfinite(score.value) and (score.value > 0 or score.metric not in BEHIND)):
            raise UnreadableError(f"scores.jsonl, line {number}", f"the value is {score.value}")


def _documents(
    directory: Path, runs: Sequence[str], own: pl.DataFrame, problems: dict[str, str]
) -> pl.DataFrame:
    frames = []
    for start in range(0, len(runs), _FILES_AT_ONCE):
        some = runs[start : start + _FILES_AT_ONCE]
        try:
            frames.append(_read(directory, some))
        except (OSError, pl.exceptions.PolarsError):
            frames += _one_by_one(directory, some, problems)
    schema = DOCUMENT_COLUMNS | {"version": pl.String()}
    documents = pl.concat(frames) if frames else pl.DataFrame(schema=schema)
    documents = documents.join(own, on=_VERSION_KEYS, how="semi", maintain_order="left").drop("version")
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
        .select(*DOCUMENT_COLUMNS.names(), "version")
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
    """(run, reason) for losses that are not finite and for documents that appear twice."""
    needed = [name for name in DOCUMENT_COLUMNS.names() if name not in _FITTED]
    broken = pl.any_horizontal(pl.col(needed).is_null(), ~pl.col("nll", *_FITTED).is_finite())
    lost = documents.filter(broken.fill_null(value=False))["run"].unique().to_list()
    twice = documents.select(*_KEYS, "document").is_duplicated()
    return [
        *((run, "a loss or a key is missing or not finite") for run in lost),
        *((run, "a document appears twice") for run in documents.filter(twice)["run"].unique()),
    ]


def _gaps(
    runs: Sequence[str], scores: pl.DataFrame, documents: pl.DataFrame, plan: Plan
) -> list[tuple[str, str]]:
    """(run, reason) for planned splits without scores or documents, unless all were trained on."""
    cells = [(domain.name, split) for domain in plan.domains for split in ("validation", "test")]
    wanted = pl.DataFrame(cells, schema=["domain", "split"], orient="row")
    gaps = []
    seen = scores.filter(metric="overlap_documents", value=1.0)  # nothing was left to score
    every = pl.DataFrame({"run": runs}, schema={"run": pl.String()}).join(wanted, how="cross")
    every = every.join(seen, on=_KEYS, how="anti", maintain_order="left")
    for there, text in (
        (scores.filter(metric="bits_per_byte"), "scores.jsonl: no bits_per_byte of {0} ({1})"),
        (documents, "documents.parquet: no documents of {0} ({1})"),
    ):
        missing = every.join(there, on=_KEYS, how="anti", maintain_order="left").unique(
            "run", keep="first", maintain_order=True
        )
        gaps += [(run, text.format(domain, split)) for run, domain, split in missing.rows()]
    return gaps


def _disagreements(scores: pl.DataFrame, documents: pl.DataFrame) -> list[tuple[str, str]]:
    """(run, reason) where a score differs from the sum of its documents."""
    sums = [pl.col(name).sum() / math.log(2) / pl.col("bytes").sum() for name in BEHIND.values()]
    behind = (
        documents.group_by(_KEYS)
        .agg(sums)
        .rename({column: metric for metric, column in BEHIND.items()})
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


def _odd_ones(scores: pl.DataFrame, documents: pl.DataFrame, plan: Plan) -> pl.DataFrame:
    """run, domain and kind of runs scored on other text or settings than most runs of their stage.

    Students decide what is usual; teachers are compared with them.
    """
    compared = BEHIND.keys() - {"bits_per_byte_temperature_in_domain"}  # a training text may lack held-out
    known = scores.filter(pl.col("metric").is_in(compared))
    versions = _fingerprints(known.select(*_KEYS, "metric", "version"))
    texts = _fingerprints(documents.select(*_KEYS, "document", "bytes"))
    columns = dict.fromkeys(("run", "kind", "stage"), pl.String())  # a stage may come late
    runs = pl.DataFrame([(run.run, run.kind, run.stage) for run in plan.runs], columns, orient="row")
    both = versions.join(texts, on=["run", "domain"], suffix="_text").join(runs, on="run")
    group = ["stage", "domain"]
    usual = (
        both.group_by(*group, "sum", "sum_text", maintain_order=True)
        .agg(teacher=(pl.col("kind") == "teacher").all(), n=pl.len())
        .sort("teacher", "n", descending=[False, True], maintain_order=True)
        .unique(group, keep="first", maintain_order=True)
    )
    return (
        both.join(usual, on=group, nulls_equal=True, suffix="_usual", maintain_order="left")
        .filter(
            (pl.col("sum") != pl.col("sum_usual")) | (pl.col("sum_text") != pl.col("sum_text_usual")),
        )
        .select("run", "domain", "kind")
    )


def _fingerprints(rows: pl.DataFrame) -> pl.DataFrame:
    """(run, domain, sum): equal where all other columns hold the same rows, in any order."""
    hashes = rows.drop("run").hash_rows(seed=0)
    return (
        rows.select("run", "domain", sum=hashes)
        .group_by("run", "domain", maintain_order=True)
        .agg(pl.col("sum").sum())
    )
