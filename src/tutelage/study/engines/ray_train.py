"""Run a task in several processes of a Ray cluster, which Ray Train's TorchTrainer places, on any nodes.

Ray Train gives each process its node, GPU and rank, and the store where they meet. What computes is a process
below each of Ray's, so that a signal can stop it and it writes a checkpoint.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tutelage.errors import UserError, one_line
from tutelage.installed import install_extra
from tutelage.launch import describe
from tutelage.study.engines import RunTask, TaskOutcome
from tutelage.study.engines.tasks import command, read_outcome, write_task

_POLL_SECONDS = 1.0


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


def check_installed() -> None:
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


def train_there(task: str, folder: str, board: Any, *, on_gpus: bool) -> str:  # noqa: ANN401 - Ray's handle
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
