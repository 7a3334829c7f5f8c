"""The commands `tutelage data`: list, build, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.errors import UserError
from tutelage.names import find

if TYPE_CHECKING:
    from rich.table import Table

    from tutelage.config.data_config import StoreConfig
    from tutelage.data.store_manifest import Manifest

data_app = typer.Typer(no_args_is_help=True, help="Turn text into token stores; look at them.")


@data_app.command("list")
def data_list() -> None:
    """List the corpora that come inside packages, with version and licence."""
    from rich.table import Table

    from tutelage.cli.bars import out, say
    from tutelage.data.corpora import CORPORA, PAIR_CORPORA

    table = Table("corpus", "kind", "package", "licence", "what", box=None)
    for kind, corpora in (("corpus", CORPORA), ("corpus_pairs", PAIR_CORPORA)):
        for corpus in corpora.values():
            package = f"{corpus.package}=={corpus.version}"
            table.add_row(corpus.name, kind, package, corpus.licence, corpus.summary)
    out.print(table)
    say("next", "`tutelage data build --corpus NAME`")


@data_app.command("build")
def data_build(
    config: Annotated[
        Path | None, typer.Argument(help="store file (YAML); `tutelage schema store` describes it")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, e.g. tokenizer.vocab_size=8000", metavar="[KEY=VALUE]..."),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="instead of a file: a named corpus, whole")] = None,
    output: Annotated[Path, typer.Option(help="directory of stores")] = Path("stores"),
) -> None:
    """Build a token store from text: read, deduplicate, split by document, tokenise, checksum."""
    from tutelage.cli.bars import RichProgress, say
    from tutelage.data.build import build_store

    settings = _store_config(config, corpus, overrides or [])
    with RichProgress() as progress:
        path = build_store(settings, output, progress)
    data_show(path)
    say(
        "next", f"put 'data: {{store: {settings.name}}}' into a run file, or {path.name} if there are several"
    )


def _store_config(config: Path | None, corpus: str | None, overrides: list[str]) -> StoreConfig:
    from tutelage.config.data_config import StoreConfig
    from tutelage.config.load import load, validate

    if (config is None) == (corpus is None):
        raise UserError("data build: give a store file or --corpus NAME")
    if config is not None:
        return load(StoreConfig, config, overrides)
    return validate(
        StoreConfig, {"name": corpus, "sources": [{"name": corpus, "kind": "corpus"}]}, "--corpus"
    )


@data_app.command("show")
def data_show(store: Annotated[Path, typer.Argument(help="token store directory")]) -> None:
    """Print what a token store holds, what was left out of it, and what else is unusual about it."""
    from rich.table import Table

    from tutelage.cli.bars import out, say
    from tutelage.data.store import open_store
    from tutelage.data.store_manifest import remarks

    store = find("store", store, "store")
    opened = open_store(store)
    out.print(_sources_table(opened.manifest))
    table = Table("split", box=None)
    for column in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(column, justify="right")
    for name, split in opened.manifest.splits.items():
        ratio = split.bytes / split.tokens if split.tokens else 0.0
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.bytes:,}", f"{ratio:.2f}")
    table.caption = f"vocabulary {opened.vocab_size:,} · fingerprint {opened.fingerprint[:16]}"
    out.print(table)
    for line in remarks(opened.manifest):
        say("note", line)
    say("store", store)


def _sources_table(manifest: Manifest) -> Table:
    """Tabulate what was taken of each source of a token store, and why rows were left out."""
    from rich.table import Table

    from tutelage.data.store_manifest import source_name

    table = Table("source", box=None)
    for column in ("documents", "bytes", "share", "wanted", *manifest.sources[0].dropped):
        table.add_column(column, justify="right", no_wrap=True)
    total = sum(record.bytes for record in manifest.sources)
    weights = sum(record.weight or 0.0 for record in manifest.sources)
    for record in manifest.sources:
        wanted = "all" if record.weight is None else f"{record.weight / weights:.1%}"
        taken = (f"{record.documents:,}", f"{record.bytes:,}", f"{record.bytes / total:.1%}", wanted)
        dropped = (f"{count:,}" for count in record.dropped.values())
        table.add_row(source_name(record.source), *taken, *dropped)
    return table
