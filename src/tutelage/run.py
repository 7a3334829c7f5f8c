"""Runs from config to scores: the single way in, for the command line, studies and Python alike."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from tutelage import provenance
from tutelage.config.load import load, to_yaml
from tutelage.config.run_config import NOT_THE_RESULT, RunConfig
from tutelage.data.store import open_store
from tutelage.errors import Stopped, UserError
from tutelage.evals import suite
from tutelage.evals.contamination import anchored
from tutelage.files import atomic_directory, check_place, write_text
from tutelage.models import hub
from tutelage.run_directory import RunDirectory, evaluation_id, pinned, run_id
from tutelage.train import distributed
from tutelage.train.checkpoint import TRUNK
from tutelage.train.loop import Nobody, Watcher, check_cohort, train
from tutelage.train.setup import Setup, prepare
from tutelage.train.student import Hook, Session
from tutelage.train.trackers import Tracker, open_tracker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from transformers import PreTrainedModel

    from tutelage.train.setup import Setup
    from tutelage.types import Score

    Run = tuple[RunConfig, RunDirectory]


def start_from_trunk(setup: Setup, directory: RunDirectory) -> None:
    """Give a run that names a trunk and has no checkpoint the trunk's, with the rows of its metrics.

    Raises:
        UserError: the trunk has none, is no beginning of this run, or decays later than this run does.
    """
    config = setup.config
    if config.runtime.trunk is None or any(directory.checkpoints.glob("step-*")):
        return
    trunk = RunDirectory(config.output / config.runtime.trunk)
    found = next(trunk.checkpoints.glob(f"{TRUNK}step-*"), None)
    if found is None:
        raise UserError(
            f"runtime.trunk {trunk.id}: {trunk.path} has no checkpoint from where its decay begins; train it "
            "with checkpoint.trunk: true, or drop runtime.trunk"
        )
    _check_same(config, trunk)
    name = found.name.removeprefix(TRUNK)
    if int(name.removeprefix("step-")) > config.optim.decay_start(setup.steps, config.global_batch_tokens):
        raise UserError(f"runtime.trunk {trunk.id}: it decays later than this run does; choose a shorter one")
    write_text(directory.path / "metrics.jsonl", (trunk.path / "metrics.jsonl").read_text(encoding="utf-8"))
    with atomic_directory(directory.checkpoints / name) as partial:
        shutil.copytree(found, partial, dirs_exist_ok=True)


def _check_same(config: RunConfig, trunk: RunDirectory) -> None:
    theirs = load(RunConfig, trunk.path / "config.yaml")
    ours, other = _recipe(config), _recipe(theirs)
    different = [field for field in ours if ours[field] != other[field]]
    if different:
        field = different[0]
        raise UserError(
            f"runtime.trunk {trunk.id}: it is no beginning of this run: {field} is {other[field]} there and "
            f"{ours[field]} here"
        )


def _recipe(config: RunConfig) -> dict[str, Any]:
    recipe = config.model_dump(mode="json", exclude=NOT_THE_RESULT | {"tokens"})
    recipe["data"]["store"] = open_store(config.data.store).fingerprint
    return recipe


_REPEAT_NOTE = (
    "{epochs:.1f} passes over the training split of {store}: repeated data can make any teacher look "
    "good (it regularises); use more text or a smaller budget for comparisons"
)


def run(config: RunConfig, watcher: Watcher | None = None) -> RunDirectory:
    """Train, export and score what `config` says, or what is left of it; finished work is kept.

    The same config always lands in the same directory. A stopped or killed run goes on from its last
    checkpoint; a finished one returns at once; new evaluation domains of a finished run are scored
    without training.

    Raises:
        UserError: something in the input is wrong, before compute is spent where that can be known.
        Stopped: the run was interrupted and can be taken up again.
    """
    return run_cohort([config], watcher)[0]


def run_cohort(configs: Sequence[RunConfig], watcher: Watcher | None = None) -> list[RunDirectory]:
    """As `run`, for several students of one teacher that read the same batches.

    The teacher is asked once per batch for all of them. Each student's result is the one it would have
    alone, to the bit, and lands in the same directory.

    Raises:
        UserError: as `run`, or the runs cannot share batches and teacher; the message names the field.
        Stopped: as `run`.
    """
    watcher = watcher or Nobody()
    configs = [pinned(config) for config in configs]
    check_cohort(configs)
    for config in configs:
        check_place(config.output)
    runs = [(config, RunDirectory(config.output / run_id(config))) for config in configs]
    _check_distinct(runs)
    for config in configs:
        suite.check(config)
    is_main = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as claims:
        left = _unfinished(runs, watcher)
        if is_main:
            for _, directory in left:
                claims.enter_context(directory.lock())
        try:
            errors = _train([run for run in left if not run[1].model.is_dir()], watcher)
            if is_main:
                _score([run for run in left if run[1].model.is_dir()], watcher)
        except Stopped:
            raise
        except BaseException as error:
            if is_main:
                _mark_failed(left, error)
            raise
        finally:
            distributed.stop()
    if errors:
        raise UserError("\n".join(map(str, errors)))
    return [directory for _, directory in runs]


def _unfinished(runs: Sequence[Run], watcher: Watcher) -> list[Run]:
    """The runs with something left to do, each once."""
    left: dict[str, Run] = {}
    for config, directory in runs:
        if directory.is_done() and not suite.missing(config, directory, int(directory.state()["step"])):
            _mark_scored(config, directory)
            watcher.note(f"{directory.path} is finished; nothing to do")
        else:
            left[directory.id] = config, directory
    return list(left.values())


def _check_distinct(runs: Sequence[Run]) -> None:
    """Refuse runs of a cohort that share a directory and are not asked for alike; equal ones are one run."""
    seen: dict[str, Run] = {}
    for config, directory in runs:
        other, place = seen.setdefault(directory.id.casefold(), (config, directory))
        if other != config:
            raise UserError(
                f"{place.id} and {directory.id} are the same run asked for in two ways (name, scoring or "
                "checkpoints differ); keep one of the files"
            )


def _score(runs: Sequence[Run], watcher: Watcher) -> None:
    """Score what is trained; with that a run is done."""
    for config, directory in runs:
        step = int(directory.state()["step"])
        model = hub.load(directory.model, attn_implementation=config.model.attn_implementation)
        model.to(hub.pick_device(config.runtime.device))
        scores = suite.score(config, directory, model, step, finished=True)
        _warn_if_parted(scores, directory, watcher)
        _mark_scored(config, directory)


def _warn_if_parted(scores: Sequence[Score], directory: RunDirectory, watcher: Watcher) -> None:
    """Say once in a run's life, and leave in state.json, that held-out and training loss are far apart."""
    state = directory.state()
    warning = suite.parted(scores, directory)
    if warning is not None and state.get("warning") is None:
        watcher.note(f"warning: {directory.id}: {warning}")
        directory.write_state(state["status"], warning=warning)


def _mark_scored(config: RunConfig, directory: RunDirectory) -> None:
    """Record that the run is done, and which versions its scores by this evaluation have."""
    known = directory.state().get("evaluations", {})
    mine = {evaluation_id(config): suite.versions(config, directory)}
    if not directory.is_done() or known | mine != known:
        directory.write_state("done", evaluations=known | mine)


def _train(runs: Sequence[Run], watcher: Watcher) -> list[UserError]:
    """Train the runs; returns what kept some of them from their end."""
    sessions: list[Session] = []
    teacher = None
    with contextlib.ExitStack() as closing:
        for config, directory in runs:
            setup = prepare(config, teacher)
            teacher = teacher or setup.trainee.teacher
            if setup.world.is_main:
                start_from_trunk(setup, directory)
                _announce(setup, directory, watcher)
            distributed.barrier()
            trackers = _trackers(setup, directory)
            for tracker in trackers:
                closing.callback(tracker.close)
            hook = _scoring(config, directory, watcher)
            sessions.append(Session(setup, directory, trackers, len(runs), hook))
        return train(sessions, watcher) if sessions else []


def _scoring(config: RunConfig, directory: RunDirectory, watcher: Watcher) -> Hook | None:
    """Scores on the way, every `eval.every` tokens; the last ones come from the exported model."""
    if config.eval.every is None:
        return None

    def call(model: PreTrainedModel, step: int) -> None:
        scores = suite.score(config, directory, model, step, finished=False)
        _warn_if_parted(scores, directory, watcher)
        bits = [s for s in scores if (s.metric, s.split) == ("bits_per_byte", "validation")]
        if bits:
            values = ", ".join(f"{score.domain} {score.value:.3f}" for score in bits)
            watcher.note(f"step {step:,}, bits per byte of validation text: {values}")

    return Hook(config.eval.every, call)


def _mark_failed(runs: Sequence[Run], error: BaseException) -> None:
    """Record the error in every run that it kept from finishing and that has none of its own."""
    for _, directory in runs:
        if directory.state().get("status") not in {"done", "failed"}:
            directory.write_state("failed", error=f"{type(error).__name__}: {error}")


def _trackers(setup: Setup, directory: RunDirectory) -> list[Tracker]:
    if not setup.world.is_main:
        return []
    config = setup.config
    return [
        open_tracker(name, directory.path, config.model_dump(mode="json")) for name in config.runtime.trackers
    ]


def _announce(setup: Setup, directory: RunDirectory, watcher: Watcher) -> None:
    config = setup.config
    notes = [*setup.notes, *suite.notes(config, directory)]
    record = provenance.collect(str(setup.device)) | {"notes": notes}
    directory.write_config(to_yaml(anchored(config)), record)
    for note in notes:
        watcher.note(note)
    if setup.epochs > 1:
        watcher.note(_REPEAT_NOTE.format(epochs=setup.epochs, store=open_store(config.data.store).path))
    for text in config.rounding(setup.steps, setup.parameters):
        watcher.note(text)
    directory.write_state("running", parameters=setup.parameters, steps=setup.steps)


__all__ = ["RunDirectory", "Stopped", "UserError", "run", "run_cohort"]
