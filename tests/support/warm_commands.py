"""Commands without the seconds that torch takes to load: a process that has loaded it forks for each.

    python warm_commands.py SOCKET

`started(folder)` runs it, and puts `tutelage` and `python` into a folder for the front of PATH. They hand
directory, environment, arguments and standard streams to the process, whose child runs the same code. Of no
use where a signal is to reach the command, or a variable that a library reads when it is loaded.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "tutelage.analysis.report.html",
    "tutelage.evals.evaluate",
    "tutelage.run",
)
THREADS = {"OMP_NUM_THREADS": "1"}
CLIENT = """#!{python} -SE
import json, os, socket, sys
if {name!r} == "python" and (len(sys.argv) != 2 or not sys.argv[1].endswith(".py")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(16) or 1))
"""


@contextmanager
def started(folder: Path) -> Iterator[Path]:
    """The folder with both commands, while the process runs."""
    place = folder / "socket"
    (folder / "bin").mkdir()
    for name in ("tutelage", "python"):
        file = folder / "bin" / name
        file.write_text(CLIENT.format(python=sys.executable, name=name, socket=str(place)))
        file.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, __file__, str(place)], env=os.environ | THREADS, start_new_session=True
    ) as server:
        try:
            while not place.exists():
                assert server.poll() is None
                time.sleep(0.1)
            yield folder / "bin"
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # and a command that nobody waits for any more


def read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := connection.recv(size - len(found))):
        found += part
    return found


def command(name: str, arguments: list[str]) -> int:
    """Run what was asked for; its exit code."""
    from tutelage.cli.main import main  # what tests import of this needs none

    sys.argv = [name, *arguments] if name == "tutelage" else arguments
    try:
        if name == "tutelage":
            main()
        else:
            sys.path[0] = str(Path.cwd())
            runpy.run_path(str(Path(arguments[0]).absolute()), run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
        return 1
    return 0


def serve(place: str) -> None:
    for module in LOADED:
        import_module(module)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{place}.new")
        server.listen()
        Path(f"{place}.new").rename(place)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here
        while True:
            connection, _ = server.accept()
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
            name, arguments, folder, environment = json.loads(read(connection, int.from_bytes(size, "big")))
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                code = command(name, arguments)
                sys.stdout.flush()
                sys.stderr.flush()
                connection.sendall(str(code).encode())
                os._exit(code)
            for stream in streams:
                os.close(stream)
            connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
