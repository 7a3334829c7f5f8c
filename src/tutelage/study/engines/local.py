"""Run tasks in worker processes on this machine, each on its own cores and GPUs, if there are any."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver, resource_tracker, spawn
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from tutelage.errors import UserError
from tutelage.launch import describe
from tutelage.models.devices import Hardware
from tutelage.processes import cores
from tutelage.stopping import held_back, leave_signals_to_parent
from tutelage.study.engines import TaskOutcome
from tutelage.study.engines.tasks import execute

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, SpawnContext
    from typing import Self

    from tutelage.config.study_config import StudyConfig
    from tutelage.study.engines import Task

    _Context = ForkServerContext | SpawnContext

_GRACE_SECONDS = 30.0
_SOCKET_ADDRESS_BYTES = 107  # the longest that Linux takes
_SOCKET_NAME = "/pymp-01234567/listener-01234567"  # multiprocessing's, under the temporary directory


class LocalEngine:
    """An `Engine` of long-lived worker processes.

    On the CPU they are forked from a server that has imported torch and done nothing else, so a worker starts
    at once and they share that memory. CUDA does not survive a fork: with GPUs each is a fresh process. So is
    each where the path of the temporary directory is too long for the server's socket.

    A worker has one place: an equal share of the cores, and a GPU. A task of several processes gets a worker
    that has as many places, starts the processes on them, and leaves when the task has ended.

    Args:
        workers: how many.
        gpus: names of the GPUs, as in CUDA_VISIBLE_DEVICES; worker i sees GPU i modulo their number.

    Raises:
        UserError: this process is itself one that is being started, and imports the script that started it.
    """

    def __init__(self, workers: int, gpus: list[str]) -> None:
        try:
            spawn.get_preparation_data("")
        except RuntimeError:  # the script would run its study in its study, which waits for itself
            raise UserError(
                "a study starts processes that import the script it is run in: put what runs it below `if "
                '__name__ == "__main__":`'
            ) from None
        self.slots = workers
        self.largest = min(workers, len(gpus)) if gpus else workers
        self._gpus = gpus
        self._workers: list[_Worker | None] = [None] * workers
        self._not_started: dict[str, TaskOutcome] = {}
        self._context: _Context = multiprocessing.get_context("spawn")
        if not gpus and sys.platform == "linux" and _fork_server_has_an_address():
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["tutelage.study.engines.forked"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self._distinct())

    def free_memory(self) -> float:
        """See `Engine`."""
        return math.inf if self._gpus else Hardware.here("cpu", 1, 1).memory

    def start(self, key: str, task: Task) -> None:
        """See `Engine`."""
        free = [i for i, worker in enumerate(self._workers) if worker is None or worker.key is None]
        places = free[: task.processes]
        worker = self._workers[places[0]]
        if worker is None or worker.is_gone() or len(places) > 1:
            try:
                self._end([one for one in self._distinct() if any(self._workers[i] is one for i in places)])
                worker = self._new_worker(places)
            except (OSError, EOFError) as error:
                text = f"its process could not be started: {type(error).__name__} {error}".rstrip()
                self._not_started[key] = TaskOutcome(status="failed", text=text)
                return
            for place in places:
                self._workers[place] = worker
        worker.start(key, task.model_dump_json())

    def _new_worker(self, places: list[int]) -> _Worker:
        gpus = [self._gpus[place % len(self._gpus)] for place in places] if self._gpus else None
        given = set().union(*(_share(place, self.slots) or () for place in places)) or None
        threads = max(1, cores() * len(places) // self.slots)
        several = len(places) > 1
        try:
            return _Worker(self._context, given, threads, gpus, several=several)
        except (OSError, EOFError):  # the server that forks workers was killed; the next try starts another
            return _Worker(self._context, given, threads, gpus, several=several)

    def _distinct(self) -> list[_Worker]:
        """The workers; one that has several places, once."""
        return list({id(worker): worker for worker in self._workers if worker is not None}.values())

    def _end(self, workers: list[_Worker]) -> None:
        """Ask workers to leave, wait for them and free their places."""
        for worker in workers:
            worker.ask_to_leave()
        for worker in workers:
            worker.end()
        self._workers = [None if any(one is gone for gone in workers) else one for one in self._workers]

    def wait(self, seconds: float) -> dict[str, TaskOutcome]:
        """See `Engine`."""
        if self._not_started:
            outcomes, self._not_started = self._not_started, {}
            return outcomes
        busy = [worker for worker in self._distinct() if worker.key is not None]
        if not busy:
            time.sleep(seconds)
            return {}
        wait([worker.connection for worker in busy], seconds)
        outcomes = {}
        for worker in busy:
            key = str(worker.key)
            outcome = worker.outcome()
            if outcome is not None:
                outcomes[key] = outcome
        self._end([one for one in self._distinct() if one.key is None and (one.is_leaving or one.several)])
        return outcomes

    def cancel(self, key: str) -> None:
        """See `Engine`."""
        for worker in self._distinct():
            if worker.key == key:
                worker.ask_to_leave()


def _start_fork_server() -> None:
    """Start the server that forks workers, if it does not run, without the signals of a terminal.

    While it loads torch it would print a traceback on Ctrl-C; later it ignores it by itself.
    """
    resource_tracker.ensure_running()  # what the server starts first else, and lets the signals through again
    with held_back():
        forkserver.ensure_running()


def _fork_server_has_an_address() -> bool:
    return len(os.fsencode(tempfile.gettempdir() + _SOCKET_NAME)) <= _SOCKET_ADDRESS_BYTES


class _Worker:
    """A process that executes one task after another until it is asked to leave.

    It leaves when a pipe to it is closed, here or by this process's death, and is gone when its own end of
    the connection is: the server that forked it, which `Process` asks, may be dead before it. Nothing is
    shared that a killed process could leave locked, such as the lock inside a `multiprocessing.Event`.
    """

    def __init__(
        self,
        context: _Context,
        given: set[int] | None,
        threads: int,
        gpus: list[str] | None,
        *,
        several: bool,
    ) -> None:
        self.key: str | None = None
        self.several = several
        leave, self._lifeline = context.Pipe(duplex=False)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, leave, given, threads, gpus), daemon=True)
        if context.get_start_method() == "forkserver":
            _start_fork_server()
        self.process.start()
        theirs.close()
        leave.close()

    @property
    def is_leaving(self) -> bool:
        return self._lifeline.closed

    def ask_to_leave(self) -> None:
        self._lifeline.close()

    def start(self, key: str, task: str) -> None:
        self.key = key
        with contextlib.suppress(BrokenPipeError):  # it died just now: `outcome` says so
            self.connection.send_bytes(task.encode())

    def outcome(self) -> TaskOutcome | None:
        """How the task ended; None while it runs."""
        try:
            if not self.connection.poll():
                return None
            outcome = TaskOutcome.model_validate_json(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            outcome = self._died()
        self.key = None
        return outcome

    def is_gone(self) -> bool:
        """Whether the process of a worker without a task has ended."""
        try:
            return self.connection.poll() and not self.connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return True

    def end(self) -> None:
        """Wait for the process, which was asked to leave or has died."""
        deadline = time.monotonic() + _GRACE_SECONDS
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                self.connection.recv_bytes()  # the outcome of a task that nobody waits for any longer
            os.kill(int(self.process.pid or 0), signal.SIGKILL)
        self.process.join()
        self.connection.close()

    def _died(self) -> TaskOutcome:
        if self.is_leaving:
            return TaskOutcome(status="stopped")
        return TaskOutcome(status="failed", text=describe(self.process.exitcode or 0))


def _serve(
    connection: Connection, leave: Connection, given: set[int] | None, threads: int, gpus: list[str] | None
) -> None:
    """Execute tasks as they arrive. What a terminal sends reaches workers too; it is the parent's matter."""
    leave_signals_to_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if given is not None:
        os.sched_setaffinity(0, given)
    leaving = threading.Event()
    threading.Thread(target=_follow, args=(leave, leaving), daemon=True).start()
    while not leaving.is_set():
        try:
            task = connection.recv_bytes()
            connection.send_bytes(execute(task.decode(), threads).encode())
        except (EOFError, ConnectionError):  # nobody is left to answer
            return


def _follow(leave: Connection, leaving: threading.Event) -> None:
    """Stop the run, checkpointed, when asked to or when the parent has died: both close `leave`."""
    with contextlib.suppress(EOFError, ConnectionError):
        leave.recv_bytes()
    leaving.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def _share(place: int, workers: int) -> set[int] | None:
    """The cores of a worker, an equal part of all; None where that cannot be set or they are too few."""
    if sys.platform != "linux":
        return None
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    return set(cores[place * each : (place + 1) * each]) or None


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that torch can use, found by a separate process."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = int(done.stdout)
    return (named or [str(number) for number in range(count)])[:count]


def default_workers() -> int:
    """One single-threaded worker per core, at most four, so that memory stays under 4 GiB."""
    return min(4, cores())


def local_engine(study: StudyConfig, workers: int | None) -> LocalEngine:
    """Choose worker processes: one per GPU if the study may use GPUs, else one per core."""
    gpus = visible_gpus() if study_device(study) != "cpu" else []
    return LocalEngine(workers or len(gpus) or default_workers(), gpus)


def default_cohort(study: StudyConfig) -> int:
    """Number of students to train together: 6 on the CPU, else 1.

    Six students of a teacher three times their size take 0.73 of the time on the CPU (LAB.md). On a GPU they
    may not fit into its memory, so there the user decides.
    """
    return 6 if study_device(study) == "cpu" else 1


def study_device(study: StudyConfig) -> str:
    """Return `runtime.device` of the study's runs."""
    return str(study.run.get("runtime", {}).get("device", "auto"))
