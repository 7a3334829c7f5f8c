"""The commands `tutelage data`: list, build; `show` is `tutelage show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.cli.show_commands import show, show_store
from tutelage.errors import UserError

if TYPE_CHECKING:
    from tutelage.config.data_config import StoreConfig

data_app = typer.Typer(no_args_is_help=True, help="Turn text into token stores; look at them.")
data_app.command("show")(show)


@data_app.command("list")
def data_list() -> None:
    """List the corpora that come inside packages, with version and licence."""
    from rich.table import Table

    from tutelage.cli.bars import out, say
    from tutelage.data.corpora import CORPORA, PAIR_CORPORA

    table = Table("corpus", "kind", "what it is, package, licence", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"  # at the end of the line; nothing is cut
    for kind, corpora in (("corpus", CORPORA), ("corpus_pairs", PAIR_CORPORA)):
        for corpus in corpora.values():
            table.add_row(corpus.name, kind, corpus.summary)
            table.add_row("", "", f"{corpus.package}=={corpus.version}; {corpus.licence}", style="dim")
    out.print(table)
    say("next", "`tutelage data build --corpus NAME`")


@data_app.command("build")
def data_build(
    config: Annotated[
        Path | None, typer.Argument(help="store file (YAML); `tutelage init store` writes one")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, e.g. tokenizer.vocab_size=8000", metavar="KEY=VALUE"),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="instead of these: a named corpus, whole")] = None,
    output: Annotated[Path, typer.Option(help="directory of stores")] = Path("stores"),
) -> None:
    """Build a token store from text: read, deduplicate, split by document, tokenise, checksum."""
    from tutelage.cli.bars import RichProgress, say
    from tutelage.cli.settings_pages import flow
    from tutelage.data.build import build_store
    from tutelage.names import typed

    settings = _store_config(config, corpus, overrides or [])
    with RichProgress() as progress:
        path = build_store(settings, output, progress)
    show_store(path)
    say("next", f"put 'data: {flow({'store': typed('store', path)})}' into a run file")


def _store_config(config: Path | None, corpus: str | None, overrides: list[str]) -> StoreConfig:
    from tutelage.config.data_config import StoreConfig
    from tutelage.config.load import load, validate

    if (config is None) == (corpus is None):
        raise UserError("data build: give a store file or --corpus NAME, which takes no KEY=VALUE")
    if config is not None:
        return load(StoreConfig, config, overrides)
    return validate(
        StoreConfig, {"name": corpus, "sources": [{"name": corpus, "kind": "corpus"}]}, "--corpus"
    )
