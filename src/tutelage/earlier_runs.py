"""Say of a run that begins which it may be taken for: what a changed setting, name or input left behind.

A run is called by a hash of whatever changes its result, so whoever stops one and edits its file gets another
one, from its beginning. That is said before anything is computed.
"""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING, Any

from tutelage.config.run_config import NOT_THE_RESULT
from tutelage.errors import shortened
from tutelage.files import is_locked
from tutelage.names import differences, flat, kind_of, settings
from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LONGEST = 120


def earlier_runs(directory: RunDirectory, config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each run that a person may have meant to go on with; none once this one has begun.

    Args:
        directory: of the run that begins.
        config: its settings, as they will be in config.yaml.
    """
    if directory.state():
        return
    name, _, recipe = directory.id.rpartition("-")
    mine = _deciding(dict(flat(config)))
    for path in sorted({*_called(directory, f"{glob.escape(name)}-*"), *_called(directory, f"*-{recipe}")}):
        other = RunDirectory(path)
        theirs = _deciding(settings(path))
        their_name, _, their_recipe = other.id.rpartition("-")
        _, differ = differences([mine, theirs])
        if their_recipe == recipe:
            yield (
                f"{path} ({_how_far(other)}) is this run under another name; with name={their_name} what it "
                "has computed is not computed again"
            )
        elif their_name == name and mine == theirs:
            yield (
                f"{path} has the same settings: the token store, or the model that it names as start or "
                "teacher, has changed since, so this is another run"
            )
        elif their_name == name and theirs and other.status() not in {"done", "not started"}:
            words = shortened(", ".join(f"{key} = {value}" for key, value in differ.items()), _LONGEST)
            yield (
                f"{path} ({_how_far(other)}) has other settings ({words}) and is left as it is: this is "
                "another run, from its beginning"
            )


def _called(directory: RunDirectory, pattern: str) -> Iterator[Any]:
    """Runs beside this one that nobody works on, by the pattern of their names."""
    for path in directory.path.parent.glob(pattern):
        if path != directory.path and kind_of(path) == "run" and not is_locked(path / "lock"):
            yield path


def _deciding(values: Mapping[str, object]) -> dict[str, object]:
    """The settings that change what a run trains."""
    return {key: value for key, value in values.items() if key.partition(".")[0] not in NOT_THE_RESULT}


def _how_far(run: RunDirectory) -> str:
    state = run.state()
    word = "killed" if state.get("status") == "running" else run.status()
    return f"{word}, {state.get('step', 0):,} of {state.get('steps') or 0:,} steps"
