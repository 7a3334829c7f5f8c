"""The commands `tutelage models`, `schema`, `verify`: what configs can say, whether all is as written."""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.errors import lookup
from tutelage.files import write_text

if TYPE_CHECKING:
    from pydantic import BaseModel


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
    kind: Annotated[str, typer.Argument(help="run, store, study or teach")],
    output: Annotated[Path | None, typer.Option(help="write to this file instead of printing")] = None,
) -> None:
    """Write the JSON schema of a config file, for editors and as reference."""
    from tutelage.cli.bars import say
    from tutelage.config.data_config import StoreConfig
    from tutelage.config.run_config import RunConfig
    from tutelage.config.study_config import StudyConfig
    from tutelage.config.teacher_config import TeachConfig

    kinds: dict[str, type[BaseModel]] = {
        "run": RunConfig,
        "store": StoreConfig,
        "study": StudyConfig,
        "teach": TeachConfig,
    }
    text = json.dumps(lookup(kinds, kind, "schema").model_json_schema(), indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    write_text(output, text)
    say("schema", output)
    say("next", f"put '# yaml-language-server: $schema={output}' on top of a file")


def verify(
    path: Annotated[
        Path, typer.Argument(help="store, cache, run or study (or its name), model, or a directory of such")
    ],
) -> None:
    """Read everything in full and compare it with its checksums; exit code 1 if something is wrong."""
    from tutelage import verify as checks
    from tutelage.cli.bars import RichProgress, say
    from tutelage.names import completed, find_any
    from tutelage.progress import counter

    path = completed(path, "path")
    path = path if path.exists() else find_any(str(path))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    wrong = right = 0
    with RichProgress() as progress:
        progress.start(path.name, size, "bytes")
        for finding in checks.verify(path, counter(progress, path.name)):
            wrong, right = wrong + (finding.wrong is not None), right + (finding.wrong is None)
            if finding.wrong is None:
                say("intact", f"{finding.path}: {finding.what}")
            else:
                say("wrong", f"{finding.path}: {finding.wrong}")
        progress.finish(path.name)
    if wrong:
        say("next", f"{wrong} wrong, {right} intact: do what the lines say, then verify again")
        raise typer.Exit(1)
    say("next", f"nothing to do: all {right} are as they were written")
