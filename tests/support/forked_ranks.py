"""Run a function on several processes without paying for torch's import in each: they are forked.

For scripts that have started no threads and no device; what a launcher does is tested with the launcher.
`said_by` waits for processes that a test started itself.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack

PORTS = range(25_000, 32_000)  # below those that any connection of another test may be given meanwhile


def free_port():
    """A port that nobody listens on."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def said_by(commands, environments, seconds=240):
    """Run commands that need one another; what each printed and said. One that fails ends the wait."""
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            )
            for command, environment in zip(commands, environments, strict=True)
        ]
        for process in started:
            stack.callback(process.kill)
        end = time.monotonic() + seconds
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            assert time.monotonic() < end, codes
            time.sleep(0.05)
        said = [process.communicate() for process in started if process.returncode is not None]
        assert codes == [0] * len(codes), (codes, said)
        return said


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
