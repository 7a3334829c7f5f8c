"""Commands without the seconds that torch takes to load: a process that has loaded it forks for each.

    python warm_commands.py SOCKET

`install(folder, socket)` puts `tutelage` and `python` into a folder, for the front of PATH. They hand
directory, environment, arguments and standard streams to the process, whose child runs the same code.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path

LOADED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "tutelage.analysis.report.html",
    "tutelage.evals.evaluate",
    "tutelage.run",
)
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


def install(folder: Path, place: Path) -> None:
    folder.mkdir()
    for name in ("tutelage", "python"):
        file = folder / name
        file.write_text(CLIENT.format(python=sys.executable, name=name, socket=str(place)))
        file.chmod(0o755)


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
        while True:
            connection, _ = server.accept()
            size, streams, _, _ = socket.recv_fds(connection, 4, 3)
            name, arguments, folder, environment = json.loads(read(connection, int.from_bytes(size, "big")))
            child = os.fork()
            if child == 0:
                server.close()
                connection.close()
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
                os._exit(code)
            for stream in streams:
                os.close(stream)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(str(code if code >= 0 else 128 - code).encode())
            connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
