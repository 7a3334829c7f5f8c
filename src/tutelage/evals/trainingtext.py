"""Which texts a model has seen: its own training store, those of the runs it goes on from, its teacher's.

A run's configuration names its store, the run or model it starts from and its teacher. These are followed
from run directory to run directory. What cannot be followed, such as a model from the Hub, is named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config import CacheTeacher, ModelTeacher, RunConfig, RunTeacher
from tutelage.configio import load
from tutelage.data.store import Store, open_store
from tutelage.errors import UserError
from tutelage.teachers.manifest import read_cache_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class TrainingText:
    """What a run has seen.

    Attributes:
        own: token store of the run; None if it is not where it was, or the model is no run.
        stores: token stores that the run, and the runs it goes on from, were trained on; its own first.
        teachers: token stores that only its teachers, or theirs, were trained on.
        unknown: of what the training text is not known, one sentence each.
    """

    own: Store | None
    stores: tuple[Store, ...]
    teachers: tuple[Store, ...]
    unknown: tuple[str, ...]


def training_text(config: RunConfig, directory: Path) -> TrainingText:
    """The texts that a run has seen.

    Args:
        config: of the run.
        directory: of the run; it need not exist yet.
    """
    unknown: list[str] = []
    own = _stores(_ancestors(config, directory, unknown), unknown)
    seen = {store.fingerprint for store in own}
    taught = _stores(_teachers(config, directory, unknown), unknown)
    place = store_of(config, directory)
    return TrainingText(
        own=next((store for store in own if store.path == place), None),
        stores=tuple(own),
        teachers=tuple(store for store in taught if store.fingerprint not in seen),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def store_of(config: RunConfig, directory: Path) -> Path:
    """Where a run's token store lies.

    Relative paths in a run's configuration are relative to where the run was started, which nobody knows any
    more. But the store lies as far from the run directories as it did then; the same finds it after both were
    moved together.
    """
    return located(config.data.store, config, directory)


def located(path: Path, config: RunConfig, directory: Path) -> Path:
    """A path of a run's configuration, from wherever one is."""
    if path.is_absolute() and path.exists():
        return path
    return Path(os.path.normpath(directory.absolute().parent / os.path.relpath(path, config.output)))


_Run = tuple[RunConfig, Path]
"""A run and its directory."""


def _stores(runs: Iterator[_Run], unknown: list[str]) -> list[Store]:
    """The stores of runs, each once."""
    found: dict[str, Store] = {}
    for config, directory in runs:
        try:
            store = open_store(store_of(config, directory))
        except UserError as error:
            unknown.append(f"overlap with the training text of {directory.name} is not known ({error})")
        else:
            found.setdefault(store.fingerprint, store)
    return [*found.values()]


def _ancestors(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """A run and those it goes on from."""
    yield config, directory
    if config.model.run is not None:
        start = directory.parent / config.model.run
    elif config.model.path is not None:
        start = located(Path(config.model.path), config, directory).parent
    else:
        return
    name = config.model.run or config.model.path
    if (before := _run(start, f"{name}, which {directory.name} goes on from", unknown)) is not None:
        yield from _ancestors(*before, unknown)


def _teachers(config: RunConfig, directory: Path, unknown: list[str]) -> Iterator[_Run]:
    """Runs that taught a run or one that it goes on from, with all that is behind those."""
    for one, place in _ancestors(config, directory, []):
        teacher = one.teacher
        kind, name = (None, "") if teacher is None else _source(teacher, one, place)
        if kind is None:
            continue
        start = place.parent / name if kind == "run" else located(Path(name), one, place).parent
        if (found := _run(start, f"{name}, which taught {place.name}", unknown)) is not None:
            yield from _ancestors(*found, unknown)
            yield from _teachers(*found, unknown)


def _source(teacher: object, config: RunConfig, directory: Path) -> tuple[str | None, str]:
    """What a teacher is, "run" or "model", and its name; None for controls."""
    if isinstance(teacher, RunTeacher):
        return "run", teacher.run
    if isinstance(teacher, ModelTeacher):
        return "model", teacher.path
    if isinstance(teacher, CacheTeacher):
        try:
            record = read_cache_manifest(located(teacher.path, config, directory)).teacher
        except UserError:
            return "model", str(teacher.path)
        return (record.kind, record.id) if record.kind in {"run", "model"} else (None, "")
    return None, ""


def _run(path: Path, what: str, unknown: list[str]) -> _Run | None:
    """The run in a directory; None if there is none, which is noted."""
    try:
        return load(RunConfig, path / "config.yaml"), path
    except UserError as error:
        unknown.append(f"training text of {what}, is not known ({error})")
    return None


def anchored(config: RunConfig) -> RunConfig:
    """The configuration as it is to be written down, so that `store_of` and its like find what it names.

    Where run directories have an absolute path, what lies relative to the working directory gets one too.
    """
    if not config.output.is_absolute():
        return config
    model, teacher = config.model, config.teacher
    if model.path is not None and Path(model.path).exists():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    if isinstance(teacher, ModelTeacher) and Path(teacher.path).exists():
        teacher = teacher.model_copy(update={"path": str(Path(teacher.path).absolute())})
    if isinstance(teacher, CacheTeacher):
        teacher = teacher.model_copy(update={"path": teacher.path.absolute()})
    data = config.data.model_copy(update={"store": config.data.store.absolute()})
    return config.model_copy(update={"data": data, "model": model, "teacher": teacher})
