"""Engines run the tasks of a study, on this machine or on a Ray cluster. Tasks and outcomes are JSON."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter

from tutelage import provenance
from tutelage.config.base import Section
from tutelage.config.data_config import StoreConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.study_config import StudyTasks
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.files import NO_SPACE, LockedError, errno_of, no_space

if TYPE_CHECKING:
    from typing import Self


class _Sent(Section):
    """What is sent to another process, maybe of another machine."""

    command: tuple[str, ...] = Field(default_factory=lambda: tuple(provenance.command()))

    def act_for_sender(self) -> None:
        """Let provenance in this process be the command that asked for the task, which can be repeated."""
        sys.argv = [*self.command]  # as multiprocessing does with processes of its own


class RunTask(_Sent):
    """Train and score runs, together if there are several; `ids` are those that they were planned with."""

    kind: Literal["runs"] = "runs"
    configs: tuple[RunConfig, ...]
    ids: tuple[str, ...]

    @property
    def processes(self) -> int:
        """Processes that it takes, each on a device of its own; the runs of a cohort agree on it."""
        return self.configs[0].parallel.processes


class StoreTask(_Sent):
    """Build a token store."""

    kind: Literal["store"] = "store"
    config: StoreConfig
    directory: Path

    @property
    def processes(self) -> int:
        """Processes that it takes."""
        return 1


class AskTask(_Sent):
    """Ask a finished run downstream tasks, those built from text from `corpus` if they name no other.

    Without a run, check that they can be asked.
    """

    kind: Literal["questions"] = "questions"
    run: Path | None
    corpus: Path | None
    tasks: StudyTasks
    stores: Path
    device: str

    @property
    def processes(self) -> int:
        """Processes that it takes."""
        return 1


Task = RunTask | StoreTask | AskTask
TASK: TypeAdapter[Task] = TypeAdapter(Annotated[Task, Field(discriminator="kind")])
"""Reads a task from JSON."""


class TaskOutcome(Section):
    """How a task ended.

    `stopped`: it can be resumed; `busy`: another process works on it; `failed`: `text` says why. No fault of
    the task, but as bad for any other, as `text` says: `disk`: no space is left; `lost`: the engine has no
    machine left to run it on. Of a store that is done, `text` is its directory.
    """

    status: Literal["done", "stopped", "busy", "failed", "disk", "lost"]
    text: str = ""


class Engine(Protocol):
    """Runs tasks. A context manager; on leaving it no task is left."""

    def __enter__(self) -> Self:
        """Get ready."""

    def __exit__(self, *_: object) -> None:
        """End the tasks that still run."""

    @property
    def slots(self) -> int:
        """Processes that can run at the same time."""

    @property
    def largest(self) -> int:
        """Processes that one task can have, each on a device of its own."""

    def free_memory(self) -> float:
        """Bytes that tasks can take together now; endless where each has a machine or a GPU of its own."""

    def start(self, key: str, task: Task) -> None:
        """Begin a task; those that run have at most `slots` processes together."""

    def wait(self, seconds: float) -> dict[str, TaskOutcome]:
        """Outcomes of tasks that have ended, by key; returns when there is one, or after `seconds`."""

    def cancel(self, key: str) -> None:
        """Ask a task to stop where it can be resumed; its outcome follows."""


def outcome_of(error: Exception) -> TaskOutcome:
    """The outcome of a task that ended with an error; a bug of ours is told with the end of its traceback."""
    if isinstance(error, Stopped):
        return TaskOutcome(status="stopped")
    if isinstance(error, LockedError):
        return TaskOutcome(status="busy", text=str(error))
    if isinstance(error, DiskError):
        return TaskOutcome(status="disk", text=str(error))
    if errno_of(error) in NO_SPACE:
        return TaskOutcome(status="disk", text=no_space("the output"))
    if isinstance(error, UserError):
        return TaskOutcome(status="failed", text=str(error))
    return TaskOutcome(status="failed", text="".join(traceback.format_exception(error, limit=-3)).strip())
