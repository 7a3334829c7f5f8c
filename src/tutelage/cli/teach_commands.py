"""`tutelage teach`: its part of the command line."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tutelage.config.teacher_config import TeachConfig


def teach(
    config: Annotated[Path, typer.Argument(help="cache file (YAML); `tutelage schema teach` describes it")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, e.g. format.ids=24", metavar="[KEY=VALUE]..."),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="write nothing; say what every format would take")
    ] = False,
) -> None:
    """Let a teacher read a token store once and keep its targets, so that every run can use them.

    Stopped or killed, the same command goes on. Several processes, also on machines that share the file
    system, may run it at the same time and divide the work.
    """
    from tutelage.config.load import load
    from tutelage.config.teacher_config import TeachConfig

    loaded = load(TeachConfig, config, overrides or [])
    if estimate:
        _print_estimate(loaded)
    else:
        _write(loaded)


def _write(config: TeachConfig) -> None:
    from tutelage.cli.progress import RichProgress, out
    from tutelage.teachers.cache.cache_writer import write_cache
    from tutelage.teachers.cache.reader import open_cache

    with RichProgress() as progress:
        path = write_cache(config, progress)
    cache = open_cache(path)
    positions = cache.manifest.layout.positions
    out.print(
        f"cache    {path}\n"
        f"size     {cache.bytes:,} bytes for {positions:,} tokens, "
        f"{cache.bytes / positions:.2f} bytes per token\n"
        f"next     put 'teacher: {{kind: cache, path: {path}}}' into a run file",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _print_estimate(config: TeachConfig) -> None:
    from rich.table import Table

    from tutelage.cli.progress import out, period
    from tutelage.teachers.cache.cache_estimate import estimate_cache
    from tutelage.teachers.cache.formats import FORMATS

    found = estimate_cache(config)
    table = Table("", "format", box=None)
    for column in ("bytes/token", "total MB", "time"):
        table.add_column(column, justify="right")
    for row in found.formats:
        table.add_row(
            "->" if row.configured else "",
            row.label,
            f"{row.bytes_per_token:.2f}",
            f"{row.total_bytes / 1e6:,.1f}",
            period(row.seconds),
        )
    out.print(table)
    for kind in dict.fromkeys(row.format.kind for row in found.formats):
        out.print(f"{kind}: {FORMATS[kind].exactness}", highlight=False, style="dim")
    out.print(
        f"\ntokens   {found.tokens:,}\n"
        f"teacher  {found.teacher_flops:.3g} FLOPs in forward passes\n"
        f"free     {found.free_bytes / 1e6:,.1f} MB on the disk of {found.path.parent}\n"
        f"measured on {found.trial_tokens:,} tokens, one process on this machine; -> the format of the file",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
