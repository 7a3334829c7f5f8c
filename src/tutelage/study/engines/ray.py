"""Run tasks on a Ray cluster (extra `ray`), each on cores and GPUs of any nodes.

Tasks travel as JSON text. The study's directory must be the same on every node, as on a cluster's file
system.

A task of several processes is placed by Ray Train's TorchTrainer, which gives each process its node, GPU and
rank, and the store where they meet. What computes is a process below each of Ray's, so that a signal can stop
it and it writes a checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tutelage.errors import UserError, one_line
from tutelage.installed import install_extra
from tutelage.launch import describe
from tutelage.models.devices import Hardware
from tutelage.study.engines import RunTask, TaskOutcome
from tutelage.study.engines.tasks import command, execute, read_outcome, write_task

if TYPE_CHECKING:
    from typing import Self

    from tutelage.study.engines import Task

_POLL_SECONDS = 1.0


_HERE = {None, "", "local"}
"""Addresses that stand for a cluster that is started here and ends with the study."""
_PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray then uses loopback for all its servers, as on those systems; it reads this when it is imported."""
_CLIENT_PORT = 10001
_ANSWER_SECONDS = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_FRAME_HEADER, _SETTINGS = 9, 4
"""RFC 9113, 3.4 and 4.1: what a client begins with; bytes of a frame's header, and the type that answers."""


class RayEngine:
    """An `Engine` on a Ray cluster.

    Args:
        address: of the cluster; "auto": the one that runs on this machine; None: that of RAY_ADDRESS, else a
            new one here, whose servers only this machine can reach.
        workers: tasks at the same time; None: as many as the cluster has GPUs, or CPUs, now.
        device: `runtime.device` of the runs: with cpu a task takes a core, otherwise a GPU if there is one.

    Raises:
        UserError: Ray is not installed, or there is no cluster at that address (known in seconds).
    """

    def __init__(self, address: str | None, workers: int | None, device: str) -> None:
        asked = os.environ.get("RAY_ADDRESS") if address is None else address
        self._options: dict[str, Any] = {"address": asked}
        self._is_here = asked in _HERE
        if self._is_here:
            os.environ.update(_PRIVATE)
            self._options = {"address": "local", "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray  # noqa: PLC0415 - an extra
        except ImportError:
            raise UserError(f"--engine ray needs Ray: {install_extra('ray')}") from None
        self._ray = ray
        if asked is not None and asked not in {*_HERE, "auto"}:
            _check_listens("--ray-address" if address is not None else "RAY_ADDRESS", asked)
        self._workers, self._device = workers, device
        self._running: dict[Any, str] = {}
        self._boards: dict[str, Any] = {}
        self._cancelled: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._ray.init(**self._options, logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = self._options["address"]
            raise UserError(f"--ray-address {where}: {' '.join(str(error).split())}") from None
        except OSError as error:  # of a cluster that is started here
            raise UserError(
                f"--engine ray: no cluster can be started here ({one_line(error)}); if a path is too long, "
                "RAY_TMPDIR=/tmp chooses another directory than TMPDIR"
            ) from None
        resources = self._ray.cluster_resources()
        gpus = 0 if self._device == "cpu" else int(resources.get("GPU", 0))
        self.largest = self.slots = self._workers or gpus or int(resources.get("CPU", 1))
        self._on_gpus = gpus > 0
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()

    def free_memory(self) -> float:
        """See `Engine`."""
        return Hardware.here("cpu", 1, 1).memory if self._is_here and not self._on_gpus else math.inf

    def start(self, key: str, task: Task) -> None:
        """See `Engine`."""
        text, folder = task.model_dump_json(), os.getcwd()  # noqa: PTH109 - text
        if task.processes == 1 or self._is_here:  # Ray Train's processes would listen on every interface
            size = task.processes
            needs = self._ray.remote(num_cpus=size, num_gpus=size if self._on_gpus else 0, max_retries=0)
            self._running[needs(_execute_there).remote(text, folder)] = key
            return
        _check_ray_train()
        free = self._ray.remote(num_cpus=0, max_retries=0)  # the processes take what they need
        board = self._boards[key] = self._ray.remote(num_cpus=0)(Board).remote()
        running = free(_train_there).remote(text, folder, board, on_gpus=self._on_gpus)
        self._running[running] = key

    def wait(self, seconds: float) -> dict[str, TaskOutcome]:
        """See `Engine`."""
        if not self._running:
            time.sleep(seconds)
            return {}
        ended, _ = self._ray.wait(list(self._running), timeout=seconds)
        return {self._running[task]: self._outcome(task, self._running.pop(task)) for task in ended}

    def cancel(self, key: str) -> None:
        """See `Engine`."""
        for task, name in self._running.items():
            if name == key and key not in self._cancelled:
                self._cancelled.add(key)
                if key in self._boards:
                    self._boards[key].stop.remote()
                else:
                    self._ray.cancel(task, force=False)  # Ctrl-C in the worker, which checkpoints

    def _outcome(self, task: Any, key: str) -> TaskOutcome:  # noqa: ANN401 - a reference of Ray's
        errors = self._ray.exceptions
        self._boards.pop(key, None)
        try:
            return TaskOutcome.model_validate_json(self._ray.get(task))
        except errors.RayError as error:
            if key in self._cancelled:
                return TaskOutcome(status="stopped")
            if isinstance(error, errors.LocalRayletDiedError):  # by which this process reaches all of it
                text = f"the Ray cluster has ended ({one_line(error, 200)}); the same command goes on"
                return TaskOutcome(status="lost", text=text)
            return TaskOutcome(status="failed", text=" ".join(str(error).split())[:500])


def _check_listens(what: str, address: str) -> None:
    """Raise UserError unless something that speaks gRPC, as Ray does, listens at `address`.

    Ray itself would try for minutes. The preface of HTTP/2 is answered by a frame of settings at once.
    """
    kind, found, place = address.rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port or (_CLIENT_PORT if kind == "ray" else None)
    except ValueError:
        host = port = None
    if not host or port is None or (found and kind != "ray"):
        raise UserError(f"{what} {address}: write HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            connection.sendall(_PREFACE)
            answer = connection.recv(_FRAME_HEADER, socket.MSG_WAITALL)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{what} {address}: nothing that is Ray answers there ({error})") from None
    if len(answer) < _FRAME_HEADER or answer[3] != _SETTINGS:
        raise UserError(f"{what} {address}: what listens there is not Ray")


def _execute_there(task: str, folder: str) -> str:
    os.chdir(folder)
    return execute(task)


class Board:
    """A Ray actor between a runner and a task's processes: asks them to stop, keeps what they say of it."""

    def __init__(self) -> None:
        self._stopping = False
        self._outcome: str | None = None

    def stop(self) -> None:
        """Ask the processes to stop."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether the processes are to stop."""
        return self._stopping

    def say(self, outcome: str) -> None:
        """Keep the outcome of the task as JSON; the first is the cause of those that follow."""
        self._outcome = self._outcome or outcome

    def outcome(self) -> str | None:
        """The outcome of the task as JSON; None if no process could say it."""
        return self._outcome


def _check_ray_train() -> None:
    """Check that Ray Train can be imported.

    Raises:
        UserError: it needs packages that are not there.
    """
    try:
        import ray.train.torch  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise UserError(
            f"parallel.processes above 1 on a Ray cluster needs Ray Train: {install_extra('ray')} "
            f"({one_line(error, 100)})"
        ) from None


def _train_there(task: str, folder: str, board: Any, *, on_gpus: bool) -> str:  # noqa: ANN401 - Ray's handle
    """Place the processes of a task and wait for them; runs in a Ray task that computes nothing.

    Args:
        task: the task as JSON.
        folder: working directory of the runner, the same on every node.
        board: handle of the task's `Board`.
        on_gpus: whether each process takes a GPU.

    Returns:
        The outcome as JSON.
    """
    import ray  # noqa: PLC0415 - an extra
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError  # noqa: PLC0415 - an extra
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415 - an extra

    os.chdir(folder)
    runs = RunTask.model_validate_json(task)
    # Ray Train wants a place that all nodes see.
    place, name = runs.configs[0].output.resolve().parent / "queue" / "ray", runs.ids[0]
    shutil.rmtree(place / name, ignore_errors=True)  # of an attempt that was killed; nobody else has this run
    trainer = TorchTrainer(
        _process,
        train_loop_config={"task": task, "folder": folder, "board": board},
        torch_config=TorchConfig(backend="gloo"),  # of Ray's processes, which compute nothing
        scaling_config=ScalingConfig(
            num_workers=runs.processes,
            use_gpu=on_gpus,
            resources_per_worker={"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1},
        ),
        run_config=RunConfig(name=name, storage_path=str(place)),
    )
    error = ""
    try:
        trainer.fit()
    except TrainingFailedError as failed:
        error = one_line(failed)
    finally:
        shutil.rmtree(place / name, ignore_errors=True)
    said: str | None = ray.get(board.outcome.remote())
    return said or TaskOutcome(status="failed", text=error or "its processes said nothing").model_dump_json()


def _process(settings: dict[str, Any]) -> None:
    """Start one process of the task below this one of Ray's, which has its rank in the environment."""
    import ray  # noqa: PLC0415 - an extra

    board, rank = settings["board"], ray.train.get_context().get_world_rank()
    with tempfile.TemporaryDirectory(prefix="tutelage-") as name:
        folder = Path(name)
        write_task(folder, settings["task"])
        # As with torchrun, the store belongs to the process that started this one.
        environment = os.environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        process = subprocess.Popen(
            [sys.executable, "-m", *command(folder)], cwd=settings["folder"], env=environment
        )
        is_stopping = False
        while process.poll() is None:
            if not is_stopping and ray.get(board.is_stopping.remote()):
                is_stopping = True
                process.terminate()
            time.sleep(_POLL_SECONDS)
        outcome, status = read_outcome(folder), process.returncode
    if status < 0 and not is_stopping:
        outcome = TaskOutcome(status="failed", text=f"rank {rank}: {describe(status)}")
    if outcome is not None:
        ray.get(board.say.remote(outcome.model_dump_json()))
    if status != 0:  # Ray Train ends the others
        raise RuntimeError(f"rank {rank}: {describe(status)}")
