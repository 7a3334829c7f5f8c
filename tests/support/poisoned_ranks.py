"""Runs on two ranks in which one of them breaks or is slow. Started by torchrun with a file of configs.

Prints, on rank 0, one line of JSON per run: its directory, what the user was told, its error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
from poison import poisoned
from training import Notes

from tutelage.config.run_config import RunConfig
from tutelage.data.loader import Loader
from tutelage.errors import UserError
from tutelage.run import run
from tutelage.train import distributed


@contextlib.contextmanager
def slow_data(seconds):
    """Let every batch of this rank come late."""
    batch = Loader.batch
    Loader.batch = lambda self, step: (time.sleep(seconds), batch(self, step))[1]
    try:
        yield
    finally:
        Loader.batch = batch


def main(path):
    leave, distributed.stop = distributed.stop, lambda: None  # one process group for all runs
    for case in json.loads(Path(path).read_text()):
        config = RunConfig.model_validate_json(json.dumps(case["config"]))
        notes, error = Notes(), None
        distributed.start(config.runtime, config.parallel)
        mine = case["rank"] == dist.get_rank()
        harm = contextlib.nullcontext()
        if mine and case["steps"]:
            harm = poisoned(*case["steps"], what=case["what"])
        elif mine:
            harm = slow_data(case["seconds"])
        with harm:
            try:
                directory = str(run(config, notes).path)
            except UserError as caught:
                directory, error = None, str(caught)
        errors = [None, None]
        dist.all_gather_object(errors, error)
        if dist.get_rank() == 0:
            print(json.dumps({"directory": directory, "notes": notes.notes, "errors": errors}), flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
