"""One of three processes of a job in which one thing after another goes wrong; what they see is written down.

The arguments are a run file as JSON, a directory for what each rank saw, and a damaged copy of the store.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tutelage import agreement
from tutelage.cli.main import _complain
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.errors import Stopped, UserError
from tutelage.files import LockedError
from tutelage.processes import place
from tutelage.run import run
from tutelage.train import loop

RANK = place().rank


def outcome(action):
    """The name of what an action raises and its line."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        return [type(error).__name__, str(error)]
    return ["", ""]


def raising(error, ranks=(0, 1, 2), seconds=60, delay=0.0):
    """A function that meets the others; `ranks` raise `error` before."""

    def meet():
        with agreement.together(seconds) as facts:
            time.sleep(delay)
            facts["same"] = 1
            if RANK in ranks and error is not None:
                raise error

    return meet


def differing():
    with agreement.together() as facts:
        facts |= {"same": [1, None], "other": "a" if RANK < 2 else "b"}


def trained(config):
    return lambda: run(validate(RunConfig, config, "test"))


def main():
    config, folder, damaged = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    mine = config | {"seed": 8} if RANK == 1 else config
    broken = config | {"data": config["data"] | {"store": damaged}} if RANK == 2 else config
    seen = {
        "fine": outcome(raising(None)),
        "alike": outcome(raising(UserError("x.yaml: wrong"))),
        "one": outcome(raising(UserError("x.yaml: wrong"), [2])),
        "two": outcome(raising(UserError(f"wrong on {RANK}"), [1, 2])),
        "bug": outcome(raising(KeyError("lost"), [1])),
        "stopped": outcome(raising(Stopped(), [2])),
        "busy": outcome(raising(LockedError("runs/x is locked"), [0])),
        "differing": outcome(differing),
        "late": outcome(raising(None, seconds=2, delay=5.0 if RANK == 1 else 0.0)),
        "fine again": outcome(raising(None)),
        "another seed": outcome(trained(mine)),
        "damaged": outcome(trained(broken)),
        "mesh": outcome(trained(config | {"parallel": {"replicate": 2}})),
        "batch": outcome(trained(config | {"global_batch_tokens": 256})),
        "trained": outcome(trained(config)),
    }
    (folder / f"{RANK}.json").write_text(json.dumps(seen))

    def step(inputs, batches, watch):
        if RANK == 1 and inputs[0].student.step == 3:
            raise ZeroDivisionError("a bug")
        return real(inputs, batches, watch)

    real, loop.train_step = loop.train_step, step
    try:
        run(validate(RunConfig, config | {"seed": 9}, "test"))
    except Exception as error:  # noqa: BLE001 - as the command line does
        _complain(error)
        sys.exit(1)


main()
