"""Say of a run that begins which it may be taken for: what a changed setting, name or input left behind.

A run is called by a hash of whatever changes its result, so whoever stops one and edits its file gets another
one, from its beginning. That is said before anything is computed.
"""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING, Any

from tutelage.config.run_config import NOT_THE_RESULT
from tutelage.errors import as_written, shortened
from tutelage.files import is_locked
from tutelage.names import differences, flat, kind_of, settings
from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LONGEST = 120
_ANY_RECIPE = "[0-9a-f]" * 8


def earlier_runs(directory: RunDirectory, config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each run that a person may have meant to go on with; none once this one has begun.

    Args:
        directory: of the run that begins.
        config: its settings, as they will be in config.yaml.
    """
    if directory.state():
        return
    name, _, recipe = directory.id.rpartition("-")
    for other in _called(directory, f"*-{recipe}"):
        their_name = other.id.rpartition("-")[0]
        yield (
            f"{other.path} ({_how_far(other)}) is this run under another name; with name={their_name} what "
            "it has computed is not computed again"
        )
    mine = _deciding(dict(flat(config)))
    for other in _called(directory, f"{glob.escape(name)}-{_ANY_RECIPE}"):
        theirs = _deciding(settings(other.path))
        if mine == theirs:
            yield (
                f"{other.path} has the same settings: the token store, or the model that it names as start "
                "or teacher, has changed since, so this is another run"
            )
        elif theirs and other.status() not in {"done", "not started"}:
            differ = differences([mine, theirs])[1]
            words = shortened(
                ", ".join(f"{key} = {as_written(value)}" for key, value in differ.items()), _LONGEST
            )
            yield (
                f"{other.path} ({_how_far(other)}) has other settings ({words}) and is left as it is: this "
                "is another run, from its beginning"
            )


def _called(directory: RunDirectory, pattern: str) -> Iterator[RunDirectory]:
    """Runs beside this one that nobody works on, by the pattern of their names."""
    for path in sorted(directory.path.parent.glob(pattern)):
        if path != directory.path and kind_of(path) == "run" and not is_locked(path / "lock"):
            yield RunDirectory(path)


def _deciding(values: Mapping[str, object]) -> dict[str, object]:
    """The settings that change what a run trains."""
    return {key: value for key, value in values.items() if key.partition(".")[0] not in NOT_THE_RESULT}


def _how_far(run: RunDirectory) -> str:
    state = run.state()
    word = "killed" if state.get("status") == "running" else run.status()
    return f"{word}, {state.get('step', 0):,} of {state.get('steps') or 0:,} steps"
