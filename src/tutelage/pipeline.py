"""One run from config to scores: the single way in, for the command line, studies and Python alike."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tutelage import provenance
from tutelage.configio import to_yaml
from tutelage.data.store import open_store
from tutelage.errors import Stopped, UserError
from tutelage.evals import suite
from tutelage.identity import run_id
from tutelage.models import hub
from tutelage.train import distributed
from tutelage.train.loop import Nobody, Watcher, train
from tutelage.train.rundir import RunDirectory
from tutelage.train.setup import Setup, pick_device, prepare
from tutelage.train.trackers import Tracker, open_tracker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.config import RunConfig

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
    watcher = watcher or Nobody()
    directory = RunDirectory(config.output / run_id(config))
    suite.check(config)
    if directory.is_done() and not suite.missing(config, directory):
        watcher.note(f"{directory.path} is finished; nothing to do")
        return directory
    is_main = os.environ.get("RANK", "0") == "0"
    with directory.claimed() if is_main else contextlib.nullcontext():
        try:
            _work(config, directory, watcher)
        except Stopped:
            raise
        except BaseException as error:
            if is_main:
                directory.write_state("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            distributed.stop()
    return directory


def _work(config: RunConfig, directory: RunDirectory, watcher: Watcher) -> None:
    if not directory.model.is_dir():
        setup = prepare(config)
        if setup.world.is_main:
            _announce(setup, directory, watcher)
        trackers = _trackers(setup, directory)
        try:
            train(setup, directory, _Shown(watcher, trackers))
        finally:
            for tracker in trackers:
                tracker.close()
        if not setup.world.is_main:
            return
    step = int(directory.state()["step"])
    model = hub.load(str(directory.model)).to(pick_device(config.runtime.device))
    suite.score(config, directory, model, step)
    directory.write_state("done")


class _Shown:
    """The watcher, with every row also sent to the trackers."""

    def __init__(self, watcher: Watcher, trackers: list[Tracker]) -> None:
        self.begin, self.advance, self.note = watcher.begin, watcher.advance, watcher.note
        self._logs = [watcher.log, *(tracker.log for tracker in trackers)]

    def log(self, row: Mapping[str, float]) -> None:
        for log in self._logs:
            log(row)


def _trackers(setup: Setup, directory: RunDirectory) -> list[Tracker]:
    if not setup.world.is_main:
        return []
    config = setup.config
    return [
        open_tracker(name, directory.path, config.model_dump(mode="json")) for name in config.runtime.trackers
    ]


def _announce(setup: Setup, directory: RunDirectory, watcher: Watcher) -> None:
    config = setup.config
    directory.write_config(to_yaml(config), provenance.collect(str(setup.device)))
    if setup.epochs > 1:
        watcher.note(_REPEAT_NOTE.format(epochs=setup.epochs, store=open_store(config.data.store).path))
    directory.write_state("running", parameters=setup.parameters, steps=setup.steps)


__all__ = ["RunDirectory", "Stopped", "UserError", "run"]
