"""Do a task of a study in this process, or in several on devices of their own, each `python -m` of this file.

Several find the task in a directory of theirs, and leave there what is to be said of it. torch is imported
where tasks run.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.agreement import last_words
from tutelage.errors import Stopped, UserError
from tutelage.launch import describe, launch
from tutelage.loading import loading
from tutelage.processes import cores, place
from tutelage.stopping import interruptible, leave_signals_to_parent
from tutelage.study.engines import TASK, AskTask, RunTask, StoreTask, TaskOutcome, outcome_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.run_directory import RunDirectory
    from tutelage.study.engines import Task

_POLL_SECONDS = 1.0


def execute(task: str, threads: int | None = None) -> str:
    """Do a task, both given and answered as JSON, so that it can be sent anywhere.

    Args:
        task: what to do.
        threads: how many torch may take at most; None for as many as this process has cores.
    """
    with interruptible():
        outcome = _execute(TASK.validate_json(task), threads or cores())
    _give_back_memory()
    return outcome.model_dump_json()


def _give_back_memory() -> None:
    """Give back what the C library keeps of a run that has ended, which is most of it.

    This process may wait long for its next task, and what it keeps would be missing to those of others.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _execute(task: Task, threads: int) -> TaskOutcome:
    task.act_for_sender()
    try:
        if isinstance(task, StoreTask):
            from tutelage.data.build import build_store  # noqa: PLC0415 - as below

            return TaskOutcome(status="done", text=str(build_store(task.config, task.directory)))
        if isinstance(task, RunTask) and task.processes > 1:
            return run_in_processes(task)
        with loading():
            import torch  # noqa: PLC0415 - slow

            from tutelage.run import run_cohort  # noqa: PLC0415 - imports torch
        if torch.get_num_threads() > threads:  # that of the server which forked this process
            torch.set_num_threads(threads)
        if isinstance(task, AskTask):
            _ask(task)
        else:
            _check_ids(task, run_cohort(task.configs))
    except KeyboardInterrupt:
        return TaskOutcome(status="stopped")
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs continue, and this is recorded
        return outcome_of(error)
    return TaskOutcome(status="done")


def _ask(task: AskTask) -> None:
    with loading():
        from tutelage.evals.evaluated_model import find_model  # noqa: PLC0415 - as above
        from tutelage.evals.lm_eval import check_tasks, run_downstream  # noqa: PLC0415
        from tutelage.evals.lm_eval_tasks import KINDS  # noqa: PLC0415

    asked = task.tasks
    if task.run is None:
        check_tasks(asked.names, asked.include)
        return
    run_downstream(
        find_model(str(task.run), task.stores),
        [f"{name}:{task.corpus}" if name in KINDS else name for name in asked.names],
        limit=asked.limit,
        batch_size=asked.batch_size,
        device=task.device,
        stores=task.stores,
        include=asked.include,
    )


def _check_ids(task: RunTask, made: Sequence[RunDirectory]) -> None:
    """Raise UserError if runs have become others, because what names them by its content was changed."""
    if tuple(directory.id for directory in made) != task.ids:
        raise UserError(
            "its text, or the model that it was given, has changed since the study was planned, so it is "
            "another run now; start the study again, which plans it anew"
        )


def run_in_processes(task: RunTask) -> TaskOutcome:
    """Start the processes of a task on this machine, wait for them and return the outcome.

    Raises:
        Stopped: this process was asked to stop; they have written checkpoints.
    """
    with tempfile.TemporaryDirectory(prefix="tutelage-") as name:
        folder = Path(name)
        write_task(folder, task.model_dump_json())
        try:
            failed = launch(task.processes, command(folder))
        except Stopped:
            return read_outcome(folder) or TaskOutcome(status="stopped")
        outcome = read_outcome(folder)
        for rank, status in failed.items():
            if status < 0 or outcome is None:  # it had no time to say anything
                return TaskOutcome(status="failed", text=f"rank {rank}: {describe(status)}")
            break
        return outcome or TaskOutcome(status="failed", text="its processes ended and said nothing")


def command(folder: Path) -> list[str]:
    """What `python -m` runs in each process."""
    return ["tutelage.study.engines.tasks", str(folder), str(os.getpid())]


def write_task(folder: Path, task: str) -> None:
    """Leave a task, as JSON, for the processes."""
    (folder / "task.json").write_text(task, encoding="utf-8")


def read_outcome(folder: Path) -> TaskOutcome | None:
    """What the processes said of the task; None if they could not."""
    path = folder / "outcome.json"
    return TaskOutcome.model_validate_json(path.read_bytes()) if path.exists() else None


def _serve(folder: Path, parent: int) -> int:
    """Be one of the processes, until the task has ended; return the exit status."""
    with loading():
        from tutelage.run import run_cohort  # noqa: PLC0415 - imports torch

    leave_signals_to_parent()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    task = RunTask.model_validate_json((folder / "task.json").read_bytes())
    task.act_for_sender()
    try:
        with interruptible():
            _check_ids(task, run_cohort(task.configs))
    except Stopped as stopped:
        outcome = outcome_of(stopped)
    except Exception as error:  # noqa: BLE001 - as in `execute`
        line = last_words(error)
        if line is None:  # another process says it
            return 1
        outcome = outcome_of(error)
        if outcome.status == "failed":
            text = line if isinstance(error, UserError) else f"{line}\n{outcome.text}"
            outcome = TaskOutcome(status="failed", text=text)
        _write(folder, outcome)
        return 1
    else:
        outcome = TaskOutcome(status="done")
    if place().is_main:
        _write(folder, outcome)
    return 0


def _write(folder: Path, outcome: TaskOutcome) -> None:
    partial = folder / f"outcome-{place().rank}.json"
    partial.write_text(outcome.model_dump_json(), encoding="utf-8")
    partial.replace(folder / "outcome.json")


def _follow(parent: int) -> None:
    """Stop the run, checkpointed, when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_serve(Path(sys.argv[1]), int(sys.argv[2])))
