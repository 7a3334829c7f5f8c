"""Budgets as branches of one run.

With a warm-up-stable-decay rate, runs that differ in their budget are the same up to the decay of the shorter
one, so the longer one can start there, to the bit.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from tutelage.config import NOT_THE_RESULT, RunConfig
from tutelage.configio import load
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.files import new_directory, write_text
from tutelage.train.checkpoint import TRUNK
from tutelage.train.rundir import RunDirectory

if TYPE_CHECKING:
    from typing import Any

    from tutelage.train.setup import Setup


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
    with new_directory(directory.checkpoints / name) as partial:
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
