"""Engines run the tasks of a study, on this machine or on a Ray cluster. Tasks and outcomes are JSON."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter

from tutelage.config.base import Section
from tutelage.config.data_config import StoreConfig
from tutelage.config.run_config import RunConfig
from tutelage.errors import Stopped, UserError
from tutelage.files import LockedError

if TYPE_CHECKING:
    from typing import Self


class RunTask(Section):
    """Train and score runs, together if there are several."""

    kind: Literal["runs"] = "runs"
    configs: tuple[RunConfig, ...]


class StoreTask(Section):
    """Build a token store."""

    kind: Literal["store"] = "store"
    config: StoreConfig
    directory: Path


Task = RunTask | StoreTask
_TASK: TypeAdapter[Task] = TypeAdapter(Annotated[Task, Field(discriminator="kind")])


class TaskOutcome(Section):
    """How a task ended.

    `stopped`: it can be resumed; `busy`: another process works on it; `failed`: `text` says why. Of a store
    that is done, `text` is its directory.
    """

    status: Literal["done", "stopped", "busy", "failed"]
    text: str = ""


class Engine(Protocol):
    """Runs tasks. A context manager; on leaving it no task is left."""

    def __enter__(self) -> Self:
        """Get ready."""

    def __exit__(self, *_: object) -> None:
        """End the tasks that still run."""

    @property
    def slots(self) -> int:
        """Tasks that can run at the same time."""

    def start(self, key: str, task: Task) -> None:
        """Begin a task; the caller starts at most `slots` at a time."""

    def wait(self, seconds: float) -> dict[str, TaskOutcome]:
        """Outcomes of tasks that have ended, by key; returns when there is one, or after `seconds`."""

    def cancel(self, key: str) -> None:
        """Ask a task to stop where it can be resumed; its outcome follows."""


def execute(task: str) -> str:
    """Do a task, both given and answered as JSON, so that it can be sent anywhere."""
    return _execute(_TASK.validate_json(task)).model_dump_json()


def _execute(task: Task) -> TaskOutcome:
    try:
        if isinstance(task, StoreTask):
            from tutelage.data.build import build_store  # noqa: PLC0415 - as below

            return TaskOutcome(status="done", text=str(build_store(task.config, task.directory)))
        from tutelage.run import run_cohort  # noqa: PLC0415 - torch is imported where tasks run

        run_cohort(task.configs)
    except Stopped:
        return TaskOutcome(status="stopped")
    except LockedError as error:
        return TaskOutcome(status="busy", text=str(error))
    except UserError as error:
        return TaskOutcome(status="failed", text=str(error))
    except Exception:  # noqa: BLE001 - whatever it is, the other runs continue, and this is recorded
        return TaskOutcome(status="failed", text=traceback.format_exc(limit=-3).strip())
    return TaskOutcome(status="done")
