"""Train on two processes of which the second dies where the first waits for it in a call of torch.

    python deserted_rank.py CONFIG WHERE

sends the first SIGTERM then, and prints its exit code and the seconds that it took to end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked_ranks
import torch
from torch import distributed as dist

from tutelage import processes
from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.run import run
from tutelage.stopping import interruptible

RENDEZVOUS = sys.modules["torch.distributed.rendezvous"]  # the package has a function of that name
CALLS = {
    "store": (RENDEZVOUS, RENDEZVOUS._create_c10d_store),
    "group": (dist, dist.init_process_group),
    "checkpoints": (dist, dist.new_group),
}
"""Calls that return when the other process makes them too, with their modules, by what they make."""


def desert(config, where, reached):
    """Run; the second process dies instead of the call, the first says that it makes it."""
    module, call = CALLS[where]

    def called(*arguments, **settings):
        if processes.place().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        reached.touch()
        return call(*arguments, **settings)

    setattr(module, call.__name__, called)
    with interruptible():  # as the command line does
        run(config)


def main(path, where):
    config, reached = load(RunConfig, Path(path)), Path(path).with_name("reached")
    first, second = forked_ranks.start(2, partial(desert, config, where, reached))
    assert forked_ranks.wait([second]) == [-signal.SIGKILL]
    deadline = time.monotonic() + 60
    while not reached.exists():
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.02)
    time.sleep(0.5)  # to the wait within the call
    assert not os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT), "it did not wait"
    began = time.monotonic()
    os.kill(first, signal.SIGTERM)
    [code] = forked_ranks.wait([first], seconds=30)
    print(code, round(time.monotonic() - began, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
