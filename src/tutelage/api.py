"""Stores, runs, scores and studies for Python: build or open, run, load as polars tables."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from tutelage.analysis import words
from tutelage.analysis.claims.judge import judge_study
from tutelage.analysis.report.csv_tables import tables_of
from tutelage.config.data_config import StoreConfig
from tutelage.config.load import taken
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyConfig
from tutelage.data import build, store
from tutelage.errors import UserError
from tutelage.names import as_path, find, kind_of, look_up
from tutelage.progress import NullProgress
from tutelage.records import UnreadableError, read_lines
from tutelage.run_directory import RunDirectory
from tutelage.study.plan import load_plan
from tutelage.study.results import load_results
from tutelage.types import Score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.data.store import Store
    from tutelage.progress import Progress


def build_store(
    config: StoreConfig | Mapping[str, Any] | Path | str,
    output: Path | str = "stores",
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Build a token store, or return the one that was built from the same config and text.

    Args:
        config: the path of a store file, its settings as a dict, or a `StoreConfig`.
        output: directory of stores.
        overrides: settings to change, as on the command line: `["tokenizer.vocab_size=8000"]`.
        progress: is told how far it is; `tutelage.RichProgress` shows rows. None: silence.

    Returns:
        Its directory, `<output>/<name>-<hash8>`.

    Raises:
        UserError: the config or a source of text is wrong, or the disk too small.
    """
    return build.build_store(taken(StoreConfig, config, overrides), as_path(output, "output"), progress)


def open_store(directory: Path | str) -> Store:
    """Open a token store: its manifest, and its splits as arrays.

    Args:
        directory: of the store; or its name.

    Raises:
        UserError: it is none, or a file is missing or cut short.
    """
    return store.open_store(find("store", directory, "store"))


def run(
    config: RunConfig | Mapping[str, Any] | Path | str,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunDirectory:
    """Train, export and score a run, or what is left of it; finished work is not repeated.

    The same config always lands in the same directory. A stopped or killed run resumes from its last
    checkpoint; a finished one returns at once.

    Args:
        config: the path of a run file, its settings as a dict, or a `RunConfig`.
        overrides: settings to change, as on the command line: `["tokens=1M", "optim.lr=1e-3"]`.
        progress: is told how far it is; `tutelage.RichProgress` shows rows. None: silence.

    Raises:
        UserError: something in the input is wrong, before compute is spent where that can be known.
        Stopped: the run was interrupted and can be resumed.
    """
    loaded = taken(RunConfig, config, overrides)
    from tutelage.run import run as run_it  # noqa: PLC0415 - torch, for which a wrong setting does not wait

    return run_it(loaded, progress)


def load_scores(directory: RunDirectory | Study | Path | str) -> pl.DataFrame:
    """Load the scores of a run, of all runs in a directory, or of a study, a row per `Score`.

    Args:
        directory: of the run, of runs, or of a study; its name; or what `run` or `open_study` returned.

    Raises:
        UserError: there are no scores, or a file of them is damaged.
    """
    if isinstance(directory, RunDirectory | Study):
        place = directory.path
    else:
        place = as_path(directory, "directory", ", a run or a study")
    if not place.exists():
        found = look_up("run", place, "directory") or look_up("study", place, "directory")
        place = found or find("run", place, "directory")
    files = [
        file for pattern in ("", "*/", "runs/*/") for file in sorted(place.glob(f"{pattern}scores.jsonl"))
    ]
    try:
        rows = [score for file in files for score in read_lines(file, Score)]
    except UnreadableError as error:
        raise UserError(f"{place}: {error}; delete the line or the file, and evaluate again") from None
    if not rows:
        remedy = (
            f"this run has no scores; `tutelage eval score {shlex.quote(place.name)}` makes some, and "
            "`eval.domains` of a run file does so at its end"
            if kind_of(place) == "run"
            else "no scores.jsonl in it or in the runs in it; give the directory of a run"
        )
        raise UserError(f"{place}: {remedy}")
    return pl.DataFrame(rows, infer_schema_length=None)


def run_study(
    study: StudyConfig | Mapping[str, Any] | Path | str,
    output: Path | str | None = None,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> Study:
    """Run a study on this machine, or what is left of it, and open it.

    Args:
        study: the path of a study file, the name of a preset ("demo"), its settings as a dict, or a
            `StudyConfig`.
        output: its directory; None: `tutelage-NAME`.
        overrides: settings to change, as on the command line: `["seeds=[43,44,45]"]`.
        workers: runs at a time; None: one per GPU, or per core (at most 4).
        progress: is told how far it is; `tutelage.RichProgress` shows rows. None: silence.

    Raises:
        UserError: something in the input is wrong, or some runs failed.
        Stopped: the study was interrupted; the same call resumes.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise UserError(f"workers = {workers!r}: must be a whole number, at least 1; None chooses one")
    from tutelage.study import run_study as studies  # noqa: PLC0415 - as above
    from tutelage.study.engines.local import default_cohort, local_engine  # noqa: PLC0415 - as above
    from tutelage.study.expand import expand  # noqa: PLC0415 - as above
    from tutelage.study.presets import load_study  # noqa: PLC0415 - as above

    preset = isinstance(study, str) and not study.endswith((".yaml", ".yml"))
    loaded = load_study(str(study), overrides) if preset else taken(StudyConfig, study, overrides)
    directory = as_path(output or f"tutelage-{loaded.name}", "output")
    options = studies.RunnerOptions(cohort=default_cohort(loaded))
    engine = local_engine(loaded, workers)
    studies.run_study(expand(loaded), directory, engine, progress or NullProgress(), options)
    return Study(directory)


def open_study(directory: Path | str) -> Study:
    """Open the directory of a study, finished or not, or the study of that name.

    Raises:
        UserError: it is none.
    """
    found = Study(find("study", directory, "study"))
    load_plan(found.path)
    return found


@dataclass(frozen=True)
class Study:
    """A study on disk, as tables. They are read when first asked for: open it again to see what is new.

    Asking for anything but the plan and the results raises `UserError` while no student has a finished run
    without a teacher beside it.

    Attributes:
        path: its directory.
    """

    path: Path

    @cached_property
    def plan(self) -> pl.DataFrame:
        """One row per planned run: what it is, its budget, the FLOPs it is expected to take."""
        rows = [planned.model_dump(exclude={"arm_settings"}) for planned in load_plan(self.path).runs]
        return pl.DataFrame(rows, infer_schema_length=None)

    @cached_property
    def results(self) -> pl.DataFrame:
        """One row per planned run: its status, and of those that are done tokens, seconds and FLOPs."""
        return load_results(self.path).runs

    @cached_property
    def judged(self) -> JudgedStudy:
        """Everything that is concluded from the results, as the objects that the report is made of."""
        return judge_study(load_results(self.path))

    @cached_property
    def scores(self) -> pl.DataFrame:
        """One row per run, text and metric, of test splits."""
        return tables_of(self.judged)["scores"]

    @cached_property
    def gains(self) -> pl.DataFrame:
        """One row per student, teacher, arm, fit and side, with 95% intervals, in percent."""
        return tables_of(self.judged)["gains"]

    @cached_property
    def accuracy(self) -> pl.DataFrame:
        """One row per student, teacher, arm and downstream task, and of their mean: gains in points."""
        return tables_of(self.judged)["accuracy"]

    @cached_property
    def verdicts(self) -> pl.DataFrame:
        """One row per student, teacher and arm: gains in percent, and the verdict in words."""
        rows = [
            {
                "student": v.student,
                "teacher": v.teacher,
                "measured": v.relation,
                "arm": words.arm(v),
                "seeds": v.n_seeds,
                "in_domain": v.in_domain.mean,
                "out_of_domain": v.out_of_domain.mean,
                "fitted": None if v.fitted is None else v.fitted.mean,
                "words": words.verdict(v),
            }
            for v in self.judged.findings.verdicts
        ]
        return pl.DataFrame(rows, infer_schema_length=None)
