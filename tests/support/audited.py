"""Run tutelage's commands in this process under an audit hook: `python -m audited OUTPUT FOREIGN COMMANDS`.

OUTPUT is the only directory that may be written to, FOREIGN one from which no code may come, COMMANDS a JSON
list of argument lists. Prints a JSON list of what happened that must not.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

# What libraries do when they are imported is not ours.
import torch
import torch.distributed.checkpoint
import transformers  # noqa: F401

from tutelage.cli.main import main as command

OUTPUT, FOREIGN = (os.path.realpath(path) for path in sys.argv[1:3])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
CHANGES |= {"os.chmod": 1, "os.truncate": 1, "shutil.rmtree": 1}
PROGRAMS = {"git", "uname"}
found: list[list[str]] = []
seen: dict[str, int] = {}


def inside(path: object, folder: str) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return isinstance(path, str) and os.path.realpath(path).startswith(folder + os.sep)


def allowed(path: object) -> bool:
    return not isinstance(path, str | bytes) or path in ("/dev/null", OUTPUT) or inside(path, OUTPUT)


def happened(event: str, *what: object) -> None:
    stack = [f"{frame.name} in {frame.filename}" for frame in traceback.extract_stack()[:-2]]
    if event.startswith("socket.") and isinstance(what[0], str | bytes) and allowed(what[0]):
        return  # a file in the output, by which this process meets its workers
    found.append([event, *map(str, what), *stack[-4:]])


def hook(event: str, arguments: tuple[object, ...]) -> None:  # noqa: C901 - an entry for each event
    """Record what must not happen; an error raised here could be swallowed."""
    seen[event] = seen.get(event, 0) + 1
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and not allowed(path):
            happened(event, path)
    elif event in CHANGES:
        if not all(allowed(path) for path in arguments[: CHANGES[event]]):
            happened(event, *arguments)
    elif event in ("pickle.find_class", "socket.bind", "socket.connect", "os.system", "os.exec"):
        happened(event, *arguments[1:] if event.startswith("socket") else arguments)
    elif event == "subprocess.Popen":
        if Path(str(arguments[0])).name not in PROGRAMS:
            happened(event, arguments[0])
    elif event == "import":
        if inside(arguments[1], FOREIGN):
            happened(event, arguments[0])
    elif event == "exec" and inside(arguments[0].co_filename, FOREIGN):
        happened(event, arguments[0])


def main() -> None:
    torch.set_num_threads(1)
    sys.addaudithook(hook)
    statuses = []
    for arguments in json.loads(sys.argv[3]):
        sys.argv = ["tutelage", *arguments]
        try:
            command()
        except SystemExit as end:
            statuses.append(end.code or 0)
    counts = {name: seen.get(name, 0) for name in ("open", "os.rename", "exec", "subprocess.Popen")}
    text = json.dumps({"statuses": statuses, "found": found, "counts": counts})
    os.write(1, f"\nAUDIT {text}\n".encode())


if __name__ == "__main__":
    main()
