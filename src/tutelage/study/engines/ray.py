"""Run tasks on a Ray cluster (extra `ray`), each on cores and GPUs of any nodes.

Tasks travel as JSON text. The study's directory must be the same on every node, as on a cluster's file
system.
"""

from __future__ import annotations

import math
import os
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tutelage.errors import UserError, one_line
from tutelage.installed import install_extra
from tutelage.models.devices import Hardware
from tutelage.study.engines import TaskOutcome, ray_train
from tutelage.study.engines.tasks import execute

if TYPE_CHECKING:
    from typing import Self

    from tutelage.study.engines import Task

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
        ray_train.check_installed()
        free = self._ray.remote(num_cpus=0, max_retries=0)  # the processes take what they need
        board = self._boards[key] = self._ray.remote(num_cpus=0)(ray_train.Board).remote()
        running = free(ray_train.train_there).remote(text, folder, board, on_gpus=self._on_gpus)
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
