"""The commands `tutelage init`, `models`, `schema`, `verify`: what configs can say, if all is as written."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tutelage.errors import UserError, unknown
from tutelage.files import write_text
from tutelage.loading import loading

_Kind = Annotated[str, typer.Argument(help="run, store, study or cache")]


def models() -> None:
    """List the ladder: named model shapes with their sizes."""
    from rich.table import Table

    from tutelage.cli.bars import out, say
    from tutelage.models.flops import parameters
    from tutelage.models.shapes import LADDER

    table = Table("shape", "family", box=None)
    for column in ("width", "layers", "non-embedding", "total", "peak lr"):
        table.add_column(column, justify="right")
    for shape in LADDER.values():
        size = parameters(shape, shape.vocab_size or 512)
        table.add_row(
            *(shape.name, shape.family, str(shape.hidden), str(shape.layers)),
            *(f"{size.non_embedding:,}", f"{size.total:,}", f"{shape.lr:g}"),
        )
    table.caption = "total: with the paper's vocabulary, or 512 entries for the nano shapes"
    out.print(table)
    say("next", "put 'model: {shape: NAME}' into a run file")


def schema(
    kind: _Kind,
    output: Annotated[Path | None, typer.Option(help="write to this file instead of printing")] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="a page of reference instead of JSON schema")
    ] = False,
) -> None:
    """Write what a config file can say: its JSON schema, for editors, or a page for people."""
    from tutelage.cli.bars import say
    from tutelage.cli.settings_pages import model_of, reference

    kind = _known(kind)
    text = reference(kind) if as_markdown else json.dumps(model_of(kind).model_json_schema(), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    write_text(output, text)
    say("schema", output)
    if not as_markdown:
        say("next", f"put '# yaml-language-server: $schema={output}' on top of a file")


def init(
    kind: _Kind,
    file: Annotated[Path | None, typer.Argument(help="default: KIND.yaml; never overwritten")] = None,
) -> None:
    """Write a config file that is valid as it stands, with every other setting in a comment."""
    from tutelage.cli.bars import say
    from tutelage.cli.settings_pages import template

    kind = _known(kind)
    place = file or Path(f"{kind}.yaml")
    text = template(kind, shlex.quote(str(place)))
    try:
        with place.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise UserError(f"{place}: exists and is left as it is; name another file") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror})") from None
    say("file", place)
    say("next", f"read it, change it, then: {text.splitlines()[1].partition(': ')[2]}")


def _known(kind: str) -> str:
    """The kind of file that is meant; a cache is also called by the command that makes it."""
    from tutelage.cli.settings_pages import KINDS

    kind = {"teach": "cache"}.get(kind, kind)
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    return kind


def verify(
    path: Annotated[
        Path, typer.Argument(help="store, cache, run or study (or its name), model, or a directory of such")
    ],
) -> None:
    """Read everything in full and compare it with its checksums; exit code 1 if it is not all intact."""
    from tutelage.cli.bars import RichProgress, say
    from tutelage.names import completed, find_any
    from tutelage.progress import counter

    with loading():
        from tutelage import verify as checks

    path = completed(path, "path")
    path = path if path.exists() else find_any(str(path))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    name = path.resolve().name
    count = {"intact": 0, "wrong": 0, "unknown": 0}
    with RichProgress() as progress:
        progress.start(name, size, "bytes")
        for finding in checks.verify(path, counter(progress, name)):
            label = "intact" if finding.wrong is None else "unknown" if finding.unknown else "wrong"
            count[label] += 1
            say(label, f"{finding.path}: {finding.wrong or finding.what}")
        progress.finish(name)
    if count["wrong"]:
        found = ", ".join(f"{number} {label}" for label, number in count.items() if number)
        say("next", f"{found}: do what the lines say, then verify again")
    elif count["unknown"]:
        say(
            "next",
            f"nothing here is known to be wrong; {count['unknown']} can only be compared where it is from",
        )
    else:
        say("next", "nothing to do: all is as it was written")
    if count["wrong"] or count["unknown"]:
        raise typer.Exit(1)
