"""Run a function on several processes without paying for torch's import in each: they are forked.

For scripts that have started no threads and no device; what a launcher does is tested with the launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(size, work):
    """Fork processes as torchrun would start them; return their process ids by rank."""
    port = free_port()
    sys.stdout.flush()
    return [_fork(rank, size, port, work) for rank in range(size)]


def _fork(rank, size, port, work):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = 1
    try:
        work()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:  # noqa: BLE001 - a child must not return into the parent's code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(children, seconds=120):
    """Exit codes by rank, negative for signals; what still runs after `seconds` is killed."""
    end = time.monotonic() + seconds
    codes = dict.fromkeys(children)
    while None in codes.values():
        for child in [child for child, code in codes.items() if code is None]:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [*codes.values()]


def run(size, work, seconds=120):
    """Run `work` on some processes, all of which must succeed."""
    codes = wait(start(size, work), seconds)
    assert codes == [0] * size, codes
