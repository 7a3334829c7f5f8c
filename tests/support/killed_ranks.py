"""Kill a process of a run of two, and start both again until the run is finished.

    python killed_ranks.py CONFIG WHOLE KILLED RELAY SEED KILLS

trains CONFIG in the output directory WHOLE without a fault, then in KILLED: it dies once half-way through a
checkpoint, and then so many times wherever it is. In RELAY two processes begin, one goes on and four finish.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked_ranks
import torch
from training import StopAt

from tutelage import processes
from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.errors import Stopped
from tutelage.run import run
from tutelage.train import checkpoint_files
from tutelage.train.checkpoint_files import write_tensors


def rows(output):
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*/metrics.jsonl"))


def kill_one(children, output, chance):
    """Let the run go on for a few rows and a moment, then kill one process; whether that met it at work."""
    start, more = rows(output), chance.randrange(1, 5)
    deadline = time.monotonic() + 60
    while rows(output) < start + more:
        assert time.monotonic() < deadline, "the run stalled"
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    os.kill(chance.choice(children), signal.SIGKILL)
    return True


def die_in_third_save(config):
    """Run until one process has written half of its part of the third checkpoint, in the background."""
    written = []

    def write(path, tensors, offsets):
        written.append(path)
        if len(written) == 3 and processes.place().rank == 1:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write_tensors(path, tensors, offsets)

    checkpoint_files.write_tensors = write
    run(config)


def main(config, whole, killed, seed, kills):
    forked_ranks.run(2, partial(run, config.model_copy(update={"output": whole})))
    config = config.model_copy(update={"output": killed})
    chance = random.Random(seed)  # noqa: S311 - moments, no secrets
    codes = forked_ranks.wait(forked_ranks.start(2, partial(die_in_third_save, config)))
    assert codes[1] == -signal.SIGKILL, codes
    assert codes[0] > 0, codes
    [left] = killed.glob("*/checkpoints/.partial-*")
    assert {path.name for path in left.parent.glob("step-*")} == {"step-000000002", "step-000000004"}
    met = 0
    while met < kills:
        children = forked_ranks.start(2, partial(run, config))
        met += kill_one(children, killed, chance)
        codes = forked_ranks.wait(children)
        assert -signal.SIGKILL in codes, codes
        assert 0 not in codes, codes  # the other process notices
    forked_ranks.run(2, partial(run, config))


def stop_after(config, step):
    try:
        run(config, StopAt(step))
    except Stopped:
        return
    raise AssertionError("it was not stopped")


def relay(config):
    """Two processes begin, one goes on, and four finish."""
    forked_ranks.run(2, partial(stop_after, config, 8))
    forked_ranks.run(1, partial(stop_after, config, 16))
    forked_ranks.run(4, partial(run, config))


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, *places = map(Path, sys.argv[1:5])
    settings = load(RunConfig, path)
    main(settings, *places[:2], *map(int, sys.argv[5:]))
    relay(settings.model_copy(update={"output": places[2]}))
