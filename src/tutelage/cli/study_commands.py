"""The commands `tutelage study`, `tutelage demo` and `tutelage report`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tutelage.errors import UserError, unknown
from tutelage.files import LockedError, lock
from tutelage.loading import loading
from tutelage.names import find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.power import StudyPower
    from tutelage.config.study_config import StudyConfig
    from tutelage.study.engines import Engine
    from tutelage.study.expand import ExpandedStudy
    from tutelage.study.leases import Runner
    from tutelage.study.run_study import RunnerOptions

_SEEDS = 5
"""Seeds from which on more of them are not asked for."""

study_app = typer.Typer(
    no_args_is_help=True,
    help="A grid of teachers and students from one file: what it will cost, run it, see how it stands.",
)

File = Annotated[
    str,
    typer.Argument(help="study file (YAML); `tutelage init study` writes one; or a preset: demo, mini, ..."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings to change, e.g. seeds=[43,44,45]", metavar="KEY=VALUE"),
]
Directory = Annotated[Path, typer.Argument(help="directory of a study, or its name, e.g. demo")]


@study_app.command("plan")
def study_plan(
    files: Annotated[
        list[str],
        typer.Argument(
            help="study files or presets, and settings to change; of several studies the runs they share "
            "count once",
            metavar="FILE | KEY=VALUE",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="the study's directory: its texts, and how fast its finished runs were"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="h100, a100, l40s, ...; default: cpu if the study says so, else h100")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="part of the peak that is reached")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="of a device for an hour")] = None,
    noise: Annotated[
        Path | None,
        typer.Option(help="finished study whose noise says what can be decided; default: a measured one"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Estimate what a study will take before anything runs, and what it can decide of its claims.

    Nothing is built or downloaded. Every cell is checked, so what cannot be run is named here.
    """
    from tutelage.cli.bars import say
    from tutelage.cli.study_output import print_forecast, print_power
    from tutelage.study.cost import Machine, forecast
    from tutelage.study.engines.local import study_device
    from tutelage.study.expand import expand
    from tutelage.study.presets import load_study
    from tutelage.study.texts import built_texts, foreseen, training_tokens

    overrides = [text for text in files if "=" in text]
    names = [text for text in files if "=" not in text]
    if not names:
        raise UserError("study plan: name a study file or a preset before KEY=VALUE settings")
    studies = [load_study(name, overrides) for name in names]
    usual = "cpu" if all(study_device(study) == "cpu" for study in studies) else "h100"
    expanded = [expand(study) for study in studies]
    built = [built_texts(output or Path(f"tutelage-{one.study.name}")) for one in expanded]
    tokens = [training_tokens(one, texts) for one, texts in zip(expanded, built, strict=True)]
    found = forecast(expanded, Machine(device or usual, devices, mfu, price), output, tokens)
    powers = _powers([one for one in expanded if one.study.claims], noise)
    if as_json:
        found["power"] = [asdict(power) | {"noise": power.noise.model_dump()} for power in powers]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for power in powers:
        print_power(power)
    for one, texts in zip(expanded, built, strict=True):
        for line in foreseen(one, texts):
            say("warning", f"{one.study.name}: {line}")
    print_forecast(found, [shlex.join([name, *overrides]) for name in names], output)


def _powers(studies: Sequence[ExpandedStudy], noise: Path | None) -> list[StudyPower]:
    """What each study can decide, by the noise of a finished study or the default."""
    if not studies:
        return []
    from tutelage.analysis.claims.judge import judge_study
    from tutelage.analysis.claims.noise import default_noise, measure_noise
    from tutelage.analysis.claims.power import power_of
    from tutelage.study.plan import draft_of
    from tutelage.study.results import load_results

    if noise is None:
        known = default_noise()
    else:
        known = measure_noise(judge_study(load_results(find("study", noise, "--noise"))))
    return [power_of(draft_of(one), known) for one in studies]


def _say_untestable(expanded: ExpandedStudy) -> None:
    """Print the announced claims that no run of the study can decide."""
    from tutelage.analysis.claims.registry import missing_of
    from tutelage.cli.bars import say
    from tutelage.study.plan import draft_of

    if not expanded.study.claims:
        return
    plan = draft_of(expanded)
    lacking = missing_of(plan)
    for claim in (claim for claim in plan.claims if claim in lacking):
        say("note", f"{plan.name}: claim {claim} is announced and cannot be decided: {lacking[claim]}")


@study_app.command("run")
def study_run(
    file: File,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="everything lands here; default: tutelage-NAME")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="runs at a time; default: one per GPU, or per core (at most 4)")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="processes here, or a Ray cluster")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="of a running Ray cluster, or auto for the one of this machine; default: RAY_ADDRESS, or a "
            "new one that only this machine can reach"
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="further attempts at a run that failed")] = 1,
    cohort: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="train up to so many students of a teacher and seed together; default: 6 if the study's "
            "runtime.device is cpu, or 1",
        ),
    ] = None,
) -> None:
    """Run a study, or what is left of it, and judge it.

    Stopped or killed, the same command resumes; runs that failed it tries again. Several of them, also on
    machines that share the directory, share the work: each run is done once, and what a killed one had begun
    is taken over.
    """
    from tutelage.study.engines.local import default_cohort, local_engine, study_device
    from tutelage.study.presets import load_study
    from tutelage.study.run_study import RunnerOptions

    study = load_study(file, overrides or [])
    directory = output or Path(f"tutelage-{study.name}")
    if engine == "ray":
        from tutelage.study.engines.ray import RayEngine

        chosen: Engine = RayEngine(ray_address, workers, study_device(study))
    else:
        chosen = local_engine(study, workers)
    run_and_report(study, directory, chosen, RunnerOptions(retries, cohort or default_cohort(study)))


def run_and_report(study: StudyConfig, directory: Path, engine: Engine, options: RunnerOptions) -> None:
    """Run a study, showing its progress, then print its verdicts and write its report."""
    from tutelage.analysis.claims.judge import judge_study
    from tutelage.analysis.report.html import build_report
    from tutelage.analysis.report.text import print_verdicts
    from tutelage.cli.bars import RichProgress, out, say
    from tutelage.study.expand import expand
    from tutelage.study.results import load_results
    from tutelage.study.run_study import run_study

    expanded = expand(study)
    _say_untestable(expanded)
    with RichProgress() as progress:
        run_study(expanded, directory, engine, progress, options)
    if all(cell.kind != "student" for cell in expanded.cells):
        say("note", "the study has no student with a teacher, so there is nothing to judge")
        say("runs", directory / "runs")
        return
    judged = judge_study(load_results(directory))
    print_verdicts(judged, out)
    out.print()
    try:
        with lock(directory / "report.lock", f"report of {directory}"):
            build_report(judged, directory)
    except LockedError:
        say("note", "another runner has just finished too and writes the report")
    say("report", directory / "report.html")
    say("runs", directory / "runs")
    seeds = len(study.seeds)
    more = f"; more seeds than {seeds} for narrower intervals, at best {_SEEDS} or more"
    say("next", f"open the report in a browser{more if seeds < _SEEDS else ''}")


@study_app.command("status")
def study_status(directory: Directory) -> None:
    """Print what is done, who works on what, what failed and why, and how good the estimates are."""
    from tutelage.cli.study_output import print_status
    from tutelage.study.status import read_status

    directory = find("study", directory, "study")
    print_status(read_status(directory), directory)


@study_app.command("stop")
def study_stop(directory: Directory) -> None:
    """Ask every runner of a study, on every machine, to checkpoint its runs and end; wait for them."""
    from tutelage.cli.bars import say
    from tutelage.study.status import stop_study

    directory = find("study", directory, "study")
    asked, left = stop_study(directory, tell=_say_asked)
    look = f"`tutelage study status {shlex.quote(str(directory))}`"
    still = f"; {left} still at it: look again with {look}" if left else ""
    if asked:
        say("stopped", f"{asked - left} of {asked} runner{'s' * (asked != 1)}{still}")
    else:
        say("asked", "nobody: no runner is at work")
    say("runs", directory / "runs")
    say(
        "next",
        "`tutelage study run` with the same file resumes" if asked else look,
    )


def _say_asked(runners: Sequence[Runner], patience_seconds: float) -> None:
    """Print who was asked to stop, before they are waited for."""
    from tutelage.cli.bars import say

    for runner in runners:
        say("asked", f"{runner.host} process {runner.pid} to stop")
    say("waiting", f"up to {patience_seconds:.0f} s for their checkpoints")


@study_app.command("retry")
def study_retry(
    directory: Directory,
    run: Annotated[list[str] | None, typer.Argument(help="run ids; default: all that failed")] = None,
) -> None:
    """Forget failed attempts, so that these runs are tried again, by runners that are at work as well."""
    from tutelage.cli.bars import say
    from tutelage.study.status import retry_runs

    directory = find("study", directory, "study")
    if not (cleared := retry_runs(directory, run or [])):
        say("again", "nothing: nothing had failed")
        say("next", f"`tutelage study status {shlex.quote(str(directory))}`")
        return
    for one in cleared:
        say("again", one)
    say("marks", directory / "queue" / "failures")
    say("next", "runners at work take them up; otherwise `tutelage study run` with the same file")


@study_app.command("tokens")
def study_tokens(
    directory: Directory,
    teacher: Annotated[
        list[str],
        typer.Option(help="teacher whose students are compared, at its tested_alpha, or NAME=ALPHA"),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="scored texts to read; default: the training text's test split and the first other"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
) -> None:
    """Compare a teacher's students with the untaught ones token by token, in every seed of a finished study.

    Tokens are sorted by the untaught student of the next seed. Documents and lengths are those that the
    study scores. What is compared already is not compared again; claim 8 reads the result.
    """
    from tutelage.cli.bars import RichProgress, say
    from tutelage.run_directory import RunDirectory
    from tutelage.study.plan import load_plan
    from tutelage.study.token_tables import runs_to_compare

    with loading():
        from tutelage.evals.evaluate import EvalRequest
        from tutelage.evals.token_comparison import compare_on_texts

    directory = find("study", directory, "study")
    plan = load_plan(directory)
    outside = [domain.name for domain in plan.domains if domain.name != plan.in_domain]
    asked = text or [plan.in_domain, *outside[:1]]
    compared = []
    for name in teacher:
        named, _, alpha = name.partition("=")
        compared += runs_to_compare(plan, named, _number(alpha, f"--teacher {name}") if alpha else None)
    runs = directory / "runs"
    with RichProgress() as progress:
        for one in compared:
            config = RunDirectory(runs / one.student).config()
            stores = {domain.name: directory / "data" / domain.store.name for domain in config.eval.domains}
            if lost := [name for name in asked if name not in stores]:
                raise unknown("--text", lost[0], stores)
            request = EvalRequest(
                {}, {name: stores[name] for name in asked}, directory,
                config.eval.max_documents, config.eval.max_tokens, device,
            )  # fmt: skip
            models = (str(runs / run) for run in (one.student, one.teacher, one.baseline, one.sorter))
            student, learned, baseline, sorter = models
            compare_on_texts(student, learned, baseline, sorter, request, directory / "overlap", progress)
    say("compared", f"{len(compared)} students on {len(asked)} texts: {directory / 'token-comparisons'}")
    say("next", f"`tutelage report {shlex.quote(str(directory))}`")


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is no number") from None


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
    again: it resumes. With one seed it shows the numbers and does not judge them.
    """
    from tutelage.study.engines.local import default_cohort, local_engine
    from tutelage.study.presets import demo_study
    from tutelage.study.run_study import RunnerOptions

    study = demo_study(seeds, tokens, quick=quick)
    run_and_report(study, output, local_engine(study, workers), RunnerOptions(cohort=default_cohort(study)))


def report(
    directory: Directory,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table of verdicts as Markdown, and write nothing")
    ] = False,
) -> None:
    """Rebuild a study's verdicts, report.html, figures and tables from its result files. Trains nothing."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it; in small products threads only spin
    from tutelage.analysis.claims.judge import judge_study
    from tutelage.analysis.report.html import build_report
    from tutelage.analysis.report.text import markdown, print_problems, print_verdicts
    from tutelage.cli.bars import err, out, say
    from tutelage.study.results import load_results

    directory = find("study", directory, "study")
    study = judge_study(load_results(directory))
    if as_markdown:
        sys.stdout.write(markdown(study.findings))
        print_problems(study.results, err)
        return
    print_verdicts(study, out)
    out.print()
    say("report", build_report(study, directory))
    say("tables", directory / "tables")
    say("next", "open the report in a browser")
