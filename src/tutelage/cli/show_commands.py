"""The commands `tutelage runs` and `tutelage show`: what lies on the disk, and what it is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.errors import UserError, as_written, check_visible
from tutelage.names import differences, find_any, flat, kind_of, look_up, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from tutelage.data.store_manifest import Manifest
    from tutelage.run_directory import RunDirectory

_LONGEST_VALUE = 48
_DAMAGED = "damaged"
"""State of a run whose state.json is there and cannot be read."""
_AGAIN = "the same `tutelage train` or `tutelage study run`"


def runs(
    directory: Annotated[
        Path, typer.Argument(help="directory of runs, or a study or its name", metavar="DIR")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead")] = False,
) -> None:
    """List runs, newest first: how far they are, their scores, and the settings in which they differ."""
    from rich.padding import Padding
    from rich.text import Text

    from tutelage.cli.bars import out, say

    found = read_runs(directory)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for row in found:
        out.print(Text(f"{row['run']}  {_how_far(row)}", style="bold"), highlight=False)
        for words in filter(
            None, (row["error"], _scores_text(row["scores"]), _settings_text(row["differs"]))
        ):
            out.print(Padding(Text(str(words)), (0, 0, 0, 2), expand=False), highlight=False)
    say("runs", f"{len(found)} in {directory}")


def read_runs(directory: Path) -> list[dict[str, Any]]:
    """What `tutelage runs` prints, as plain data.

    Raises:
        UserError: there is no such directory.
    """
    study = directory if directory.is_dir() else look_up("study", directory, "directory of runs")
    if study is None:
        check_visible(directory)
        raise UserError(f"{directory}: no such directory; `tutelage train` puts runs into runs/")
    folder = study / "runs" if kind_of(study) == "study" else study
    paths = [path for path in folder.iterdir() if kind_of(path) == "run"]
    paths.sort(
        key=lambda path: (path / "state.json").stat().st_mtime if (path / "state.json").exists() else 0
    )
    rows = [_row(path) for path in reversed(paths)]
    known = [settings(path) for path in reversed(paths)]
    chosen = {key for path in paths for key in _chosen(path)}
    set_here = [{key: value for key, value in one.items() if key in chosen} for one in known]
    for row, differs in zip(rows, differences(set_here), strict=True):
        row["differs"] = differs
    return rows


def _chosen(path: Path) -> dict[str, object]:
    """The settings of a run that are not what they are by default; all of them where that cannot be told."""
    from tutelage.run_directory import RunDirectory

    try:
        config = RunDirectory(path).config()
    except UserError:
        return settings(path)
    return dict(flat(config.model_dump(mode="json", exclude_defaults=True)))


def _row(path: Path) -> dict[str, Any]:
    """State and scores of one run: bits per byte of its last step, on the test split, by text."""
    from tutelage.evals.score_files import last_bits_per_byte, read_scores
    from tutelage.files import is_locked
    from tutelage.run_directory import RunDirectory

    directory = RunDirectory(path)
    state = directory.state()
    status = state.get("status", "not started")
    if status == "running" and not is_locked(path / "lock"):
        status = "killed"
    error = state.get("error") if status == "failed" else None
    try:
        scores = read_scores(directory.scores)
    except UserError as unreadable:
        scores, error = [], str(unreadable)
    if not state and (path / "state.json").exists():
        status = _DAMAGED
        error = f"{path / 'state.json'} is damaged; {_AGAIN} makes it again from the last checkpoint"
    return {
        "run": directory.id,
        "path": str(path),
        "state": status,
        "step": state.get("step", 0),
        "steps": state.get("steps"),
        "changed": (path / "state.json").stat().st_mtime if state else None,
        "error": error,
        "scores": {domain: value for (domain, _), value in last_bits_per_byte(scores).items()},
    }


def _how_far(row: dict[str, Any]) -> str:
    from tutelage.cli.stages import period

    if row["state"] == _DAMAGED:
        return "how far it is cannot be read"
    steps = f"{row['step']:,}" + ("" if row["steps"] is None else f" of {row['steps']:,}") + " steps"
    age = "" if row["changed"] is None else f", {period(max(0.0, time.time() - row['changed']))} ago"
    return f"{row['state']}, {steps}{age}"


def _scores_text(scores: dict[str, float]) -> str:
    return (
        "bits per byte: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if scores
        else ""
    )


def _settings_text(values: dict[str, object]) -> str:
    texts = ((key, as_written(value)) for key, value in values.items())
    return ", ".join(
        f"{key} {text if len(text) <= _LONGEST_VALUE else f'{text[: _LONGEST_VALUE - 3]}...'}"
        for key, text in texts
    )


def show(
    name: Annotated[str, typer.Argument(help="name or directory of a store, run, cache or study")],
    only_path: Annotated[bool, typer.Option("--path", help="print its directory and nothing else")] = False,
) -> None:
    """Say what a store, run, cache or study is; with --path where it lies, for scripts."""
    path = find_any(name)
    if only_path:
        sys.stdout.write(f"{path}\n")
        return
    printers: dict[str, Callable[[Path], None]] = {
        "store": show_store,
        "run": _show_run,
        "cache": _show_cache,
        "study": _show_study,
    }
    printers[str(kind_of(path))](path)


def _show_run(path: Path) -> None:
    from tutelage.cli.bars import say
    from tutelage.run_directory import RunDirectory

    row, directory = _row(path), RunDirectory(path)
    say("run", f"{row['run']}: {_how_far(row)}")
    for label, words in (("error", row["error"]), ("scores", _scores_text(row["scores"]))):
        if words:
            say(label, words)
    say("settings", _settings_text(_chosen(path)))
    say("model", _model_of(directory, row["state"]))
    say("path", path)


def _model_of(directory: RunDirectory, status: str) -> Path | str:
    """Where the model of a run is, or why it is not there."""
    if directory.is_trained():
        return directory.model
    if status == _DAMAGED:
        return "not known to be finished: see error"
    if directory.lacks_weights():
        return directory.to_have_model()
    return (
        f"not there; {directory.to_have_model()}" if status == "done" else "not yet: `tutelage train` goes on"
    )


def _show_cache(path: Path) -> None:
    from tutelage.cli.bars import say
    from tutelage.teachers.cache.layout import read_cache_manifest

    manifest = read_cache_manifest(path)
    layout = manifest.layout
    done = sum(1 for shard in range(layout.shards) if (path / layout.file(shard)).is_file())
    say("cache", f"{path.name}: {layout.positions:,} tokens, {done} of {layout.shards} files written")
    say("teacher", f"{manifest.teacher.kind} {manifest.teacher.id}")
    say("format", _settings_text(manifest.format.model_dump(mode="json")))
    say("contexts", f"of {layout.context_length} tokens, temperature {manifest.temperature:g}")
    say("text", f"token store of fingerprint {manifest.store[:16]}, split {manifest.split}")
    say("path", path)


def _show_study(path: Path) -> None:
    from tutelage.cli.study_output import print_status
    from tutelage.study.status import read_status

    print_status(read_status(path), path)


def show_store(path: Path) -> None:
    """Print what a token store holds, what was left out of it, and what else is unusual about it."""
    from rich.table import Table

    from tutelage.cli.bars import print_table, say
    from tutelage.data.store import open_store
    from tutelage.data.store_manifest import remarks

    opened = open_store(path)
    print_table(_sources_table(opened.manifest))
    table = Table("split", box=None)
    for column in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in opened.manifest.splits.items():
        ratio = split.bytes / split.tokens if split.tokens else 0.0
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", f"{ratio:.2f}")
    table.caption = f"vocabulary {opened.vocab_size:,} · fingerprint {opened.fingerprint[:16]}"
    print_table(table)
    for line in remarks(opened.manifest):
        say("note", line)
    say("store", path)


def _sources_table(manifest: Manifest) -> Table:
    """Tabulate what was taken of each source of a token store, and why rows were left out."""
    from rich.table import Table

    from tutelage.data.store_manifest import source_name

    table = Table("source", box=None)
    for column in ("documents", "bytes", "share", "wanted", *manifest.sources[0].dropped):
        table.add_column(column, justify="right", no_wrap=True)
    total = sum(record.bytes for record in manifest.sources) or 1
    weights = sum(record.weight or 0.0 for record in manifest.sources) or 1.0
    for record in manifest.sources:
        wanted = "all" if record.weight is None else f"{record.weight / weights:.1%}"
        taken = (f"{record.documents:,}", f"{record.bytes:,}", f"{record.bytes / total:.1%}", wanted)
        dropped = (f"{count:,}" for count in record.dropped.values())
        table.add_row(source_name(record.source), *taken, *dropped)
    return table
