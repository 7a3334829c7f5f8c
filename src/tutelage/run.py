"""Run a config from its token store to its scores, stage by stage; the command line and studies start here.

Open the students, open the teacher (write its cache if asked), train, export, score.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tutelage import agreement, processes, provenance
from tutelage.config.load import dotted, to_yaml
from tutelage.data.store import open_store
from tutelage.earlier_runs import earlier_runs
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.evals import evaluate
from tutelage.evals.contamination import anchored, read_again
from tutelage.evals.score_files import read_scores, show_in_card
from tutelage.files import atomic_directory, check_place, write_text
from tutelage.models import hub
from tutelage.progress import NullProgress, Progress, counter
from tutelage.run_directory import RunDirectory, evaluation_id, pinned, recipe, run_id
from tutelage.run_plan import check_fits, out_of_memory
from tutelage.stopping import stop_signal
from tutelage.train import distributed
from tutelage.train.checkpoint_files import (
    CheckpointManifest,
    adopt,
    checkpoint_name,
    damage,
    recipe_differences,
)
from tutelage.train.loop import LackOfMemoryError, train
from tutelage.train.parallel import use_model
from tutelage.train.save_model import export
from tutelage.train.setup import GivenModels, check_cohort, open_student, open_teacher
from tutelage.train.trackers import send_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.train.distributed import World
    from tutelage.train.student import Student
    from tutelage.types import Score

    Run = tuple[RunConfig, RunDirectory]

_ALONE_SECONDS = 86_400
"""How long the other processes wait while the first writes and compares models, or scores them."""


def run(config: RunConfig, progress: Progress | None = None) -> RunDirectory:
    """Train, export and score a run, or what is left of it; finished work is not repeated.

    The same config always lands in the same directory. A stopped or killed run resumes from its last
    checkpoint; a finished one returns at once; new evaluation domains of a finished run are scored
    without training.

    Raises:
        UserError: something in the input is wrong, before compute is spent where that can be known.
        Stopped: the run was interrupted and can be resumed.
    """
    return run_cohort([config], progress)[0]


def run_cohort(configs: Sequence[RunConfig], progress: Progress | None = None) -> list[RunDirectory]:
    """Run several students of one teacher that read the same batches together.

    The teacher's targets are computed once per batch for all of them. Each student's result is the one it
    would have alone, to the bit, and lands in the same directory.

    Raises:
        UserError: as `run`, or the runs cannot share batches and teacher; the message names the field.
        Stopped: as `run`.
    """
    try:
        return _run_cohort(configs, progress or NullProgress())
    except KeyboardInterrupt:
        raise Stopped from None


def _run_cohort(configs: Sequence[RunConfig], progress: Progress) -> list[RunDirectory]:
    is_main = processes.place().is_main
    with contextlib.ExitStack() as locks:
        with agreement.together(configs[0].parallel.timeout) as facts:
            configs = [pinned(config) for config in configs]
            given = GivenModels(configs)  # before runs are named by their content
            runs = _planned(configs)
            left = _unfinished(runs, progress)
            untrained = [run for run in left if not run[1].is_trained()]
            if processes.place().size > 1:
                facts.update(_what_must_agree(runs, left))
            if is_main:
                for _, directory in left:
                    locks.enter_context(directory.lock())
        try:
            failed = _train(untrained, given, progress)
            distributed.stop()
            if is_main:
                _score([run for run in left if run[1].is_trained()], progress)
        except (Stopped, KeyboardInterrupt):
            with stop_signal():
                distributed.stop()
                if is_main:
                    _mark_ended(left, "stopped")
            raise
        except BaseException as error:
            if is_main:
                _mark_ended(left, "failed", error=f"{type(error).__name__}: {error}")
            raise
    if failed is not None:
        with agreement.together(_ALONE_SECONDS):  # a process that ends with an error ends all of them
            pass
        raise failed
    return [directory for _, directory in runs]


def _what_must_agree(runs: Sequence[Run], left: Sequence[Run]) -> dict[str, object]:
    """What all processes of a job must have in common, by the name of the field.

    A store may lie elsewhere on another machine, if it is the same; the run directories may not.
    """
    facts: dict[str, object] = {"the code": provenance.code()}
    for config, directory in runs:
        settings = dotted(config.model_dump(mode="json"))
        facts |= {f"{config.name}: {field}": value for field, value in settings}
        del facts[f"{config.name}: data.store"]
        facts[f"{config.name}: fingerprint of data.store"] = open_store(config.data.store).fingerprint
        facts[f"{config.name}: run"] = directory.id
    facts["runs that are not finished"] = [directory.id for _, directory in left]
    return facts


def _planned(configs: Sequence[RunConfig]) -> list[Run]:
    """Check the configs and name their directories, before anything is computed."""
    check_cohort(configs)
    for config in configs:
        check_place(config.output)
    runs = [(config, RunDirectory(config.output / run_id(config))) for config in configs]
    _check_distinct(runs)
    for config in configs:
        evaluate.check_domains(config)
    return runs


def _unfinished(runs: Sequence[Run], progress: Progress) -> list[Run]:
    """Return the runs that are not trained and scored yet, each once."""
    left: dict[str, Run] = {}
    for config, directory in runs:
        if directory.is_done() and not evaluate.missing_domains(config, directory):
            if processes.place().is_main:
                _mark_scored(config, directory)
                if directory.mend_config(to_yaml(anchored(config))):
                    progress.note(f"{directory.path / 'config.yaml'} was missing or damaged: written again")
            progress.note(f"{directory.path} is finished; nothing to do")
        else:
            for line in directory.damaged_records():
                progress.note(line)
            left[directory.id] = config, directory
    return list(left.values())


def _check_distinct(runs: Sequence[Run]) -> None:
    """Refuse configs of a cohort that differ but share a directory; equal ones are one run."""
    seen: dict[str, Run] = {}
    for config, directory in runs:
        other, place = seen.setdefault(directory.id.casefold(), (config, directory))
        if other != config:
            raise UserError(
                f"{place.id} and {directory.id} are the same run asked for in two ways (name, scoring or "
                "checkpoints differ); keep one of the files"
            )


def _train(runs: Sequence[Run], given: GivenModels, progress: Progress) -> UserError | None:
    """Open, train and export the runs; return the errors of those that could not be finished, as one."""
    if not runs:
        return None
    parallel = runs[0][0].parallel
    world = distributed.start(runs[0][0].runtime, parallel)
    with contextlib.ExitStack() as closing:
        with agreement.together(parallel.timeout):  # apart: the first to open takes of what others see free
            _check_memory(runs, world, progress)
        with agreement.together(parallel.timeout):
            students = _open(runs, world, progress)
            given.refuse_change()
            for student in students:
                closing.callback(student.close)
                student.resume(cohort=len(students))
                if world.is_main and student.step:
                    # again: a kill may have taken them along
                    student.log.show_scores(read_scores(student.directory.scores))
            if world.is_main:
                for student in students:
                    _announce(student, progress)
        try:
            train(students, progress, partial(_evaluate, progress))
        except LackOfMemoryError as error:
            configs = [config for config, _ in runs]
            table = out_of_memory(configs, world.device.type, world.size, world.local_size)
            raise UserError("\n".join([str(error), *table])) from error
    for student in students:
        for warning in student.take_warnings():
            progress.note(f"warning: {warning}")
    try:
        with agreement.together(_ALONE_SECONDS):
            _export(students)
    except UserError as error:
        return error
    return None


def _check_memory(runs: Sequence[Run], world: World, progress: Progress) -> None:
    """Refuse runs that cannot fit into the memory that is free, and warn of those that may not."""
    configs = [config for config, _ in runs]
    warning = check_fits(configs, world.device.type, world.size, world.local_size)
    if warning and world.is_main:
        progress.note(f"warning: {warning}")


def _open(runs: Sequence[Run], world: World, progress: Progress) -> list[Student]:
    """Open students and teacher, whose cache is written if asked for; give branches their checkpoint."""
    students = [open_student(config, directory, world) for config, directory in runs]
    taught = [student for student in students if student.config.teacher is not None]
    if taught:
        teacher = open_teacher(taught[0].config, world, progress if world.is_main else None)
        for student in taught:
            student.learn_from(teacher)
    if world.is_main:
        for student in students:
            _copy_branch_point(student)
    return students


def _announce(student: Student, progress: Progress) -> None:
    """Write config.yaml, provenance.json and state.json, and tell the user what to know before training."""
    config, directory = student.config, student.directory
    scoring = evaluate.domain_notes(config, directory, student.steps)
    kept = anchored(config)
    earlier = earlier_runs(directory, kept.model_dump(mode="json"))
    notes = [*student.notes, *scoring, *earlier, *read_again(config, directory.path)]
    record = provenance.collect(str(student.world.device)) | {"notes": notes}
    directory.write_config(to_yaml(kept), record)
    for note in notes:
        progress.note(note)
    if student.epochs > 1:
        progress.note(
            f"{student.epochs:.1f} passes over the training split of {open_store(config.data.store).path}: "
            "repeated data can make any teacher look good (it regularises); use more text or a smaller "
            "budget for comparisons"
        )
    for text in config.rounding(student.steps, student.parameter_count):
        progress.note(text)
    directory.write_state("running", parameters=student.parameter_count, steps=student.steps)


def _evaluate(progress: Progress, student: Student) -> None:
    """Score a student between two steps, on all processes; the last scores come from the exported model."""
    main = student.world.is_main

    def score(model: PreTrainedModel) -> list[Score]:
        run_and_step = student.config, student.directory, model, student.step
        return evaluate.score_run(*run_and_step, finished=False, writes=main, meet=distributed.barrier)

    scores = use_model(student.module, score)
    if not main:
        return
    student.log.show_scores(scores)
    _warn_of_loss_gap(scores, student.directory, progress)
    bits = [s for s in scores if (s.metric, s.split) == ("bits_per_byte", "validation")]
    if bits:
        values = ", ".join(f"{score.domain} {score.value:.3f}" for score in bits)
        progress.note(f"step {student.step:,}, bits per byte of validation text: {values}")


def _export(students: Sequence[Student]) -> None:
    """Write the model directories of the trained students, and mark those as failed where that fails.

    All processes take part: each has a part of the weights.

    Raises:
        UserError: of those that could not be finished.
        Stopped: the signal to stop came meanwhile; they are finished.
    """
    with stop_signal() as stop:  # a directory that is begun is finished
        for student in students:
            if student.error is None and student.step == student.steps:
                try:
                    export(student)
                except UserError as error:
                    student.mark_failed(error)
    if errors := [student.error for student in students if student.error is not None]:
        kind = DiskError if all(isinstance(error, DiskError) for error in errors) else UserError
        raise kind("\n".join(map(str, errors)))
    if stop.is_set():
        raise Stopped


def _score(runs: Sequence[Run], progress: Progress) -> None:
    """Score the exported models on what is left of their domains, and mark the runs as done."""
    for config, directory in runs:
        step, began = int(directory.state()["step"]), time.perf_counter()
        if evaluate.missing_domains(config, directory, step):
            progress.start(stage := f"{directory.id}: scores", unit="tokens")
            model = hub.load(directory.model, attn_implementation=config.model.attn_implementation)
            scored = config, directory, model.to(hub.pick_device(config.runtime.device)), step
            scores = evaluate.score_run(*scored, finished=True, progress=counter(progress, stage))
            _warn_of_loss_gap(scores, directory, progress)
            progress.finish(stage)
        scores = read_scores(directory.scores)
        show_in_card(directory.scores, scores)  # of a model that is exported again
        for failure in send_scores(config, directory.path, scores, step):  # those of a stopped session too
            progress.note(f"warning: {directory.id}: {failure}")
        _mark_scored(config, directory, scoring_seconds=round(time.perf_counter() - began, 3))


def _warn_of_loss_gap(scores: Sequence[Score], directory: RunDirectory, progress: Progress) -> None:
    """Warn once per run, and in state.json, that held-out and training loss are far apart."""
    state = directory.state()
    if (warning := evaluate.loss_gap_warning(scores, directory)) and state.get("warning") is None:
        progress.note(f"warning: {directory.id}: {warning}")
        directory.write_state(state["status"], warning=warning)


def _mark_scored(config: RunConfig, directory: RunDirectory, **measured: float) -> None:
    """Record that the run is done, the versions of its scores by this evaluation, and what was measured."""
    known = directory.state().get("evaluations", {})
    mine = {evaluation_id(config): evaluate.score_versions(config, directory)}
    if not directory.is_done() or known | mine != known:
        directory.write_state("done", evaluations=known | mine, **measured)


def _mark_ended(runs: Sequence[Run], status: str, error: str | None = None) -> None:
    """Record how it ended in every run that has begun and has no end of its own: done, or failed."""
    for _, directory in runs:
        if directory.status() in ("running", "stopped"):
            directory.write_state(status, error=error)


def _copy_branch_point(student: Student) -> None:
    """Give a run that branches from another and has no checkpoint the other's, with the rows of its metrics.

    Raises:
        UserError: the other has none, computes something else, or decays later than this run does.
    """
    config, directory = student.config, student.directory
    if config.runtime.branch_from is None or directory.saved():
        return
    other = RunDirectory(config.output / config.runtime.branch_from)
    kept = other.branch_point()
    if kept is None:
        raise UserError(
            f"runtime.branch_from {other.id}: {other.path} has no checkpoint from where its decay "
            "begins; train it with checkpoint.keep_before_decay: true, anew if it is past that (remove "
            f"{other.path}), or drop runtime.branch_from (in a study, the same command does)"
        )
    step, found = kept
    if (reason := damage(found)) is not None:
        raise UserError(
            f"runtime.branch_from {other.id}: {found} cannot be started from ({reason}); remove {other.path} "
            f"and train that run again, or drop runtime.branch_from (in a study, remove {found})"
        )
    origin = CheckpointManifest.read(found).origin
    until_there = _with_later_settings(config, origin.recipe)
    if not origin.is_of(run_id(until_there)):
        unlike = recipe_differences(origin.recipe, recipe(until_there))
        reason = next(unlike, "the model that it starts from has changed since")
        raise UserError(f"runtime.branch_from {other.id}: it is no beginning of this run: {reason}")
    if step > config.optim.decay_start(student.steps, config.global_batch_tokens):
        raise UserError(
            f"runtime.branch_from {other.id}: it decays later than this run does; choose a shorter one"
        )
    log = other.path / "metrics.jsonl"  # lost rows are named when the run begins
    write_text(directory.path / log.name, log.read_text(encoding="utf-8") if log.is_file() else "")
    with atomic_directory(directory.checkpoints / checkpoint_name(step)) as partial_directory:
        shutil.copytree(found, partial_directory, dirs_exist_ok=True)
        adopt(partial_directory, directory.id, recipe(config))


def _with_later_settings(config: RunConfig, theirs: Mapping[str, Any]) -> RunConfig:
    """The run with those settings of another's recipe that no step of the stable part depends on."""
    optim = config.optim.model_copy(update={name: theirs["optim"][name] for name in ("decay", "final_lr")})
    later = {
        "tokens": theirs["tokens"],
        "export_dtype": theirs.get("export_dtype", "float32"),
        "optim": optim,
    }
    return config.model_copy(update=later)


__all__ = ["RunDirectory", "Stopped", "UserError", "run", "run_cohort"]
