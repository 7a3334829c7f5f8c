"""Run a study's runs in local worker processes, each as soon as what it needs is finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

from tutelage.config import RunConfig
from tutelage.errors import Stopped, UserError
from tutelage.signals import stop_signal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.synchronize import Event

    from tutelage.study.graph import Node

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0


class StudyWatcher(Protocol):
    """Whoever looks on while a study runs."""

    def show(
        self, nodes: Sequence[Node], running: set[str], finished: set[str], failed: dict[str, str]
    ) -> None:
        """Called every half second with the ids of runs in each state."""


def default_workers() -> int:
    """One single-threaded worker per core, at most four, so that memory stays under 4 GiB."""
    return max(1, min(4, os.cpu_count() or 1))


def run_all(nodes: Sequence[Node], workers: int, watcher: StudyWatcher) -> None:
    """Run `nodes`; finished ones cost nothing, stopped ones go on, a failed one stops only its dependants.

    Raises:
        UserError: some runs failed; the message lists them. What finished is kept.
        Stopped: on Ctrl-C, after the running ones have written their checkpoints.
    """
    waiting, finished, failed = list(nodes), set[str](), dict[str, str]()
    futures: dict[Future[None], Node] = {}
    context = multiprocessing.get_context("spawn")
    leave = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(leave,))
    with stop_signal() as stop, pool:
        while waiting or futures:
            _fail_dependants(waiting, failed)
            ready = [node for node in waiting if finished.issuperset(node.needs)]
            for node in ready[: workers - len(futures)]:
                waiting.remove(node)
                futures[pool.submit(_work, node.config.model_dump_json())] = node
            watcher.show(nodes, {node.id for node in futures.values()}, finished, failed)
            done, _ = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            if stop.is_set() or any(isinstance(future.exception(), Stopped) for future in done):
                leave.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise Stopped
            for future in done:
                node, error = futures.pop(future), future.exception()
                if error is None:
                    finished.add(node.id)
                else:
                    failed[node.id] = f"{type(error).__name__}: {error}"
    watcher.show(nodes, set(), finished, failed)
    if failed:
        lines = "\n".join(f"  {run}: {reason}" for run, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(nodes)} runs failed; the others are finished and kept\n{lines}"
        )


def _fail_dependants(waiting: list[Node], failed: dict[str, str]) -> None:
    for node in list(waiting):
        broken = [need for need in node.needs if need in failed]
        if broken:
            waiting.remove(node)
            failed[node.id] = f"needs {broken[0]}, which failed"


def _start_worker(leave: Event) -> None:
    """A worker stops its run, checkpointed, when the study is stopped and when its parent has died.

    Ctrl-C in a terminal reaches workers too; they leave it to the parent, which sets `leave`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        while not leave.wait(_POLL_SECONDS):
            if parent is not None and not parent.is_alive():
                break
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(config_json: str) -> None:
    from tutelage.pipeline import run  # noqa: PLC0415 - torch is imported in workers, not in the parent

    run(RunConfig.model_validate_json(config_json))
