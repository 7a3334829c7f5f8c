"""The command line: parse, load a config, make one call, say where the output is and what to do next."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.cli.eval_commands import eval_app
from tutelage.cli.study_commands import default_cohort, local_engine, run_and_report, study_app
from tutelage.cli.teach_commands import teach
from tutelage.errors import Stopped, UserError, lookup

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

    from tutelage.config.data_config import StoreConfig
    from tutelage.data.store_manifest import Manifest

app = typer.Typer(
    name="tutelage",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain language models with a teacher, and measure which teacher, how much of it, and whether "
    "it pays.\n\n"
    "Start with `tutelage demo`: minutes on a laptop, real text, no account.",
)
data_app = typer.Typer(no_args_is_help=True, help="Turn text into token stores; look at them; check them.")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(eval_app, name="eval")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings to change, e.g. optim.lr=1e-3", metavar="[KEY=VALUE]...")
]


def main() -> None:
    """Entry point of the `tutelage` command: user errors become one line and exit code 2."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        sys.stderr.write(f"error: {error.filename or 'output'}: {error.strerror}\n")
        sys.exit(2)
    except Stopped:
        sys.stderr.write("\nstopped; run the same command again to go on\n")
        sys.exit(130)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="everything lands here")] = Path("tutelage-demo"),
    seeds: Annotated[
        int,
        typer.Option(
            min=1, max=100, help="replicates, each with students and teachers of its own; 1: no verdict"
        ),
    ] = 3,
    tokens: Annotated[str | None, typer.Option(help="training tokens of every run, e.g. 1M")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default: cores, at most 4")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a tenth of the tokens, less text to score: under 90 seconds")
    ] = False,
) -> None:
    """Does this teacher help this student? Train them all on real text and answer with intervals.

    Builds a token store from the State of the Union addresses, pretrains a small, an equal and a large
    teacher for each of three seeds, then students alone and with each teacher (and with a unigram control),
    scores them in and out of domain, prints the verdicts and writes report.html. Interrupt it and run it
    again: it goes on. With one seed it shows the numbers and does not judge them.
    """
    from tutelage.study.presets import demo_study
    from tutelage.study.run_study import RunnerOptions

    study = demo_study(seeds, tokens, quick=quick)
    run_and_report(study, output, local_engine(study, workers), RunnerOptions(cohort=default_cohort(study)))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="directory of a study, e.g. tutelage-demo")],
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table of verdicts as Markdown, and write nothing")
    ] = False,
) -> None:
    """Rebuild a study's verdicts, report.html, figures and tables from its result files. Trains nothing."""
    from tutelage.analysis.claims.judge import judge_study
    from tutelage.analysis.report.html import build_report
    from tutelage.analysis.report.text import markdown, print_verdicts
    from tutelage.cli.progress import out
    from tutelage.study.results import load_results

    study = judge_study(load_results(directory))
    if as_markdown:
        sys.stdout.write(markdown(study.findings))
        return
    print_verdicts(study, out)
    out.print(f"\nreport   {build_report(study, directory)}", highlight=False, soft_wrap=True)
    out.print(f"tables   {directory / 'tables'}", highlight=False, soft_wrap=True)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="run file (YAML); `tutelage schema run` describes it")],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="settings to change, and further run files", metavar="[KEY=VALUE | CONFIG]..."),
    ] = None,
) -> None:
    """Train one model, with or without a teacher, and score it. The same command goes on after a stop.

    Several run files train together as a cohort: students that read the same batches and share a teacher,
    which then computes its targets once for all of them. Each gets the result it would have alone.

    Several processes: torchrun --nproc-per-node 2 -m tutelage train RUN.yaml
    """
    from tutelage.cli.progress import RichProgress, out
    from tutelage.config.load import load
    from tutelage.config.run_config import RunConfig
    from tutelage.run import run_cohort

    overrides = [text for text in more or [] if "=" in text]
    files = [config, *(Path(text) for text in more or [] if "=" not in text)]
    loaded = [load(RunConfig, file, overrides) for file in files]
    with RichProgress() as progress:
        directories = run_cohort(loaded, progress)
    for directory in directories:
        out.print(f"run      {directory.path}\nmodel    {directory.model}", highlight=False, soft_wrap=True)
        if directory.scores.exists():
            out.print(f"scores   {directory.scores}", highlight=False, soft_wrap=True)
    out.print(
        f"next     teach a student with it: teacher={{kind: run, run: {directories[0].id}}}",
        highlight=False,
        soft_wrap=True,
    )


app.command()(teach)


@app.command()
def models() -> None:
    """List the ladder: named model shapes with their sizes."""
    from rich.table import Table

    from tutelage.cli.progress import out
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


@app.command()
def doctor() -> None:
    """Print versions and devices, and what works. Exit code 1 if a part that is needed does not."""
    from tutelage.cli.doctor import examine
    from tutelage.cli.progress import out

    checks = examine()
    for check in checks:
        mark = "[green]ok[/green] " if check.ok else "[yellow]--[/yellow] "
        out.print(f"{mark} {check.name:<22}", end="")
        out.print(check.detail + (f"  ->  {check.fix}" if check.fix else ""), highlight=False, markup=False)
    raise typer.Exit(int(any(check.required and not check.ok for check in checks)))


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="run, store, study or teach")],
    output: Annotated[Path | None, typer.Option(help="write to this file instead of printing")] = None,
) -> None:
    """Write the JSON schema of a config file, for editors and as reference."""
    import json

    from tutelage.config.data_config import StoreConfig
    from tutelage.config.run_config import RunConfig
    from tutelage.config.study_config import StudyConfig
    from tutelage.config.teacher_config import TeachConfig
    from tutelage.files import write_text

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
    sys.stdout.write(
        f"schema   {output}\nnext     put '# yaml-language-server: $schema={output}' on top of a file\n"
    )


@data_app.command("list")
def data_list() -> None:
    """List the corpora that come inside packages, with version and licence."""
    from rich.table import Table

    from tutelage.cli.progress import out
    from tutelage.data.corpora import CORPORA, PAIR_CORPORA

    table = Table("corpus", "kind", "package", "licence", "what", box=None)
    for kind, corpora in (("corpus", CORPORA), ("corpus_pairs", PAIR_CORPORA)):
        for corpus in corpora.values():
            package = f"{corpus.package}=={corpus.version}"
            table.add_row(corpus.name, kind, package, corpus.licence, corpus.description)
    out.print(table)


@data_app.command("build")
def data_build(
    config: Annotated[
        Path | None, typer.Argument(help="store file (YAML); `tutelage schema store` describes it")
    ] = None,
    overrides: Overrides = None,
    corpus: Annotated[str | None, typer.Option(help="instead of a file: a named corpus, whole")] = None,
    output: Annotated[Path, typer.Option(help="directory of stores")] = Path("stores"),
) -> None:
    """Text to token store: read, deduplicate, split by document, tokenise, checksum."""
    from tutelage.cli.progress import RichProgress, out
    from tutelage.data.build import build_store

    settings = _store_config(config, corpus, overrides or [])
    with RichProgress() as progress:
        path = build_store(settings, output, progress)
    data_show(path)
    out.print(
        f"\nstore    {path}\nnext     put 'data: {{store: {path}}}' into a run file",
        highlight=False,
        soft_wrap=True,
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

    from tutelage.cli.progress import out
    from tutelage.data.store import open_store
    from tutelage.data.store_manifest import remarks

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
        out.print(f"note     {line}", highlight=False, markup=False, soft_wrap=True, style="yellow")


def _sources_table(manifest: Manifest) -> Table:
    """What was taken of every source of a token store, and how many rows were left out for which reason."""
    from rich.markup import escape
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
        table.add_row(escape(source_name(record.source)), *taken, *dropped)
    return table


@data_app.command("verify")
def data_verify(
    directory: Annotated[Path, typer.Argument(help="token store or teacher cache")],
) -> None:
    """Recompute every checksum of a token store or a teacher cache."""
    from tutelage.cli.progress import out

    if (directory / "shards").is_dir():
        from tutelage.teachers.cache.reader import verify_cache

        verify_cache(directory)
    else:
        from tutelage.data.store import verify_store

        verify_store(directory)
    out.print(f"{directory}: every file is as it was written", highlight=False, soft_wrap=True)
