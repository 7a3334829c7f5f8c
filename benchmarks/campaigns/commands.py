"""Run `tutelage` commands in processes forked from one that has imported torch, and disturb them.

A fork costs hundredths of a second where a fresh process costs five, so hundreds of faults are affordable.
The parent must have started no threads and used no device. Each command has a session of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import socket
import sys
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tutelage.run  # noqa: F401 - seconds of torch, which the commands need not wait for
from tutelage.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HANG_SECONDS = 90.0
"""Far more than any command here needs; what runs longer hangs."""

_POLL_SECONDS = 0.01
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code, negative for a signal.
        out: what it printed.
        err: its complaints and notes.
        seconds: how long it took.
        cpu: seconds that its processes computed.
        hung: it was ended by the harness.
    """

    code: int
    out: str
    err: str
    seconds: float
    cpu: float
    hung: bool = False

    @property
    def complaint(self) -> str:
        """The line that says what was wrong, or the last one."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")


class Command:
    """A command that runs in one process, or several as torchrun would start them."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        *,
        ranks: int = 1,
        prepare: Callable[[int], None] | None = None,
        environment: Mapping[str, str] | None = None,
        memory: int | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: after `tutelage`; `python` and a path run that script instead.
            folder: its working directory; what it prints lands beside it, under the name of this process.
            ranks: processes of it.
            prepare: called with the rank in each process, before the command.
            environment: variables to set.
            memory: bytes of address space that it may take more than its parent has.
        """
        self.folder = folder
        self.began = time.monotonic()
        self._cpu = 0.0
        logs = folder.with_name(f"log-{os.getpid()}-{next(_NUMBERS)}")
        self._logs = [logs.with_name(f"{logs.name}-{rank}") for rank in range(ranks)]
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        variables = dict(environment or {})
        if ranks > 1:
            variables |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.processes: dict[int, int | None] = {}
        for rank in range(ranks):
            mine = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.processes[self._fork(arguments, rank, mine, prepare, memory)] = None

    def _fork(
        self,
        arguments: list[str],
        rank: int,
        variables: Mapping[str, str],
        prepare: Callable[[int], None] | None,
        memory: int | None,
    ) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            return child
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._redirect(rank)
            os.chdir(self.folder)
            os.environ.update(variables)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory is not None:
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
                limit = pages * resource.getpagesize() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            sys.argv = ["tutelage", *arguments]
            sys.modules["__main__"] = types.ModuleType("__main__")  # which a study's workers import again
            if prepare is not None:
                prepare(rank)
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 - a child must not return into the parent's code
            traceback.print_exc()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _redirect(self, rank: int) -> None:
        for number, suffix in ((1, "out"), (2, "err")):
            file = os.open(f"{self._logs[rank]}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for process, code in self.processes.items():
            if code is None:
                found, status, used = os.wait4(process, os.WNOHANG)
                if found:
                    self._cpu += used.ru_utime + used.ru_stime
                    self.processes[process] = os.waitstatus_to_exitcode(status)
        return None not in self.processes.values()

    def send(self, number: int, which: int | None = None) -> None:
        """Send a signal to those that have not ended; to one of them only, if `which` is its rank."""
        for rank, (process, code) in enumerate(self.processes.items()):
            if code is None and which in (None, rank):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    def wait(self, seconds: float = HANG_SECONDS) -> Outcome:
        """Wait for the end; what has not ended after `seconds` is killed and has hung."""
        end, hung = self.began + seconds, False
        while not self.poll():
            if time.monotonic() > end and not hung:
                hung = True
                self.sweep()
            time.sleep(_POLL_SECONDS)
        return self.outcome(hung=hung)

    def outcome(self, *, hung: bool = False) -> Outcome:
        """What became of it; of several processes the first that failed speaks, and all that was said."""
        codes = [code for code in self.processes.values() if code is not None]
        code = next((one for one in codes if one not in (0, 130)), codes[0])
        texts = {suffix: "".join(_text(f"{log}.{suffix}") for log in self._logs) for suffix in ("out", "err")}
        return Outcome(code, texts["out"], texts["err"], time.monotonic() - self.began, self._cpu, hung)

    def sweep(self) -> None:
        """Kill every process of the command that is left, those that it started too."""
        for process in self.processes:
            for one in session(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)


def _text(log: str) -> str:
    """What was printed; a process that was stopped at once has not begun to."""
    path = Path(log)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def session(leader: int) -> list[int]:
    """Processes of the session of `leader` that have not ended."""
    found = []
    for name in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        with contextlib.suppress(OSError):  # it has just ended
            text = Path(f"/proc/{name}/stat").read_text(encoding="utf-8")
            state, _, _, own = text.rsplit(")", 1)[1].split()[:4]
            if int(own) == leader and state != "Z":
                found.append(int(name))
    return found


def run(arguments: list[str], folder: Path, seconds: float = HANG_SECONDS, **how: Any) -> Outcome:  # noqa: ANN401 - those of `Command`
    """Run a command to its end."""
    command = Command(arguments, folder, **how)
    outcome = command.wait(seconds)
    command.sweep()
    return outcome


_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def _changed(event: str, arguments: tuple[Any, ...]) -> object:
    """What a file operation changes, as an audit hook is told of it; None if it only looks."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return path if writes else None
    return arguments[0] if event in _CHANGES else None


def on_changes(act: Callable[[int], None], rank: int = 0) -> Callable[[int], None]:
    """Prepare a command so that `act` gets 1, 2, ... just before its changes of files in its directory.

    Opening to write, renaming and removing are changes, and so is a flush, which changes what a cut of the
    power leaves. A moment that is named by such a number lies between two states of the files, and is the
    same on a faster machine. The processes that a study starts have no such moments.
    """

    def prepare(mine: int) -> None:
        if mine != rank:
            return
        seen, place, flush = itertools.count(1), str(Path.cwd()), os.fsync

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            path = _changed(event, arguments)
            if isinstance(path, str | os.PathLike):
                text = os.fspath(path)
                if isinstance(text, str) and (not text.startswith("/") or text.startswith(place)):
                    act(next(seen))

        def counted_flush(file: int) -> None:
            act(next(seen))
            flush(file)

        os.fsync = counted_flush  # type: ignore[assignment] - a flush is no event that a hook is told of
        sys.addaudithook(hook)

    return prepare


def kill_at(number: int, sent: int = signal.SIGKILL) -> Callable[[int], None]:
    """A function for `on_changes` that sends its own process a signal before a change."""
    return lambda seen: os.kill(os.getpid(), sent) if seen == number else None


def count_changes(arguments: list[str], folder: Path, **how: Any) -> tuple[int, Outcome]:  # noqa: ANN401
    """How many changes of files the first process of a command makes, and how it ended."""
    note = folder.with_name(f"changes-{os.getpid()}")
    file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    outcome = run(arguments, folder, prepare=on_changes(lambda _: os.write(file, b".")), **how)
    os.close(file)
    return note.stat().st_size, outcome
