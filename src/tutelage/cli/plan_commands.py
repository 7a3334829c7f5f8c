"""The commands `tutelage plan`, `tutelage plan fit` and `tutelage plan backtest`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tutelage.errors import UserError, lookup
from tutelage.names import find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.planner.advice import PlanRequest
    from tutelage.planner.points import GainSide, StudyPoints
    from tutelage.planner.study_fit import Basis

plan_app = typer.Typer(help="Should this student be distilled, from whom, how, and at what cost?")

Studies = Annotated[list[Path], typer.Argument(help="directories of finished studies, or their names")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
FitFile = Annotated[Path | None, typer.Option("--fit", help="predict by this fit, which `plan fit` wrote")]
Shape = Annotated[str | None, typer.Option(help="its shape; `tutelage models` lists them")]
Tokens = Annotated[str | None, typer.Option(help="its training tokens, e.g. 50B")]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN|MODEL|SHAPE@TOKENS",
        help="a run, a model, or a shape with the tokens it would be trained on; may be repeated",
    ),
]
Devices = Annotated[str, typer.Option(help="kind and number of devices")]
Price = Annotated[float | None, typer.Option(min=0.0, help="of a device for an hour")]
ByStudies = Annotated[list[Path] | None, typer.Option(help="predict by this finished study; may be repeated")]
For = Annotated[
    Literal["in_domain", "out_of_domain", "fitted"],
    typer.Option("--for", help="what alpha is chosen for; fitted: out of domain, with calibration fitted"),
]
StudentText = Annotated[Path | None, typer.Option(help="token store of the student's text")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="setting of the runs, e.g. data.sequence_length=8192"),
]
RunFiles = Annotated[
    Path | None, typer.Option(help="write run files to this directory, which `tutelage train` starts")
]


@plan_app.callback(invoke_without_command=True)
def plan(
    ctx: typer.Context,
    student: Shape = None,
    tokens: Tokens = None,
    teacher: Teachers = None,
    hardware: Devices = "h100x8",
    price: Price = None,
    study: ByStudies = None,
    fit: FitFile = None,
    side: For = "in_domain",
    store: StudentText = None,
    settings: Settings = None,
    output: RunFiles = None,
    as_json: AsJson = False,
) -> None:
    """Predict what teachers give a student, beside the same compute spent on it without a teacher.

    Without --study or --fit the predictions are those of published laws, for pure distillation of models of
    143M parameters and more. What is outside of what was measured is named and not predicted. Nothing runs.
    """
    if ctx.invoked_subcommand is not None:
        return
    if student is None or tokens is None or not teacher:
        raise UserError(
            "plan: give --student SHAPE --tokens TOKENS and a --teacher or more; or a command: fit, backtest"
        )
    from tutelage.cli.plan_output import plain, print_advice
    from tutelage.planner.advice import advise
    from tutelage.planner.candidates import find_candidate
    from tutelage.planner.run_files import run_files, save_run_files

    basis = _basis(study or [], fit)
    request = _request((student, tokens, hardware), price, basis, side, store, settings or [])
    place = "STORE" if store is None else str(store)
    found = [
        find_candidate(one, request.config, request.vocab_size, basis, place)
        for one in dict.fromkeys(teacher)
    ]
    advice = advise(request, found)
    files = run_files(request, advice)
    if output is not None:
        if store is None:
            raise UserError("plan: --output writes run files, which need the text: give --store")
        save_run_files(output, files)
    if as_json:
        sys.stdout.write(json.dumps(plain(request, advice, files), indent=2) + "\n")
    else:
        print_advice(request, advice, files, output)


def _basis(studies: list[Path], fit: Path | None) -> Basis:
    from tutelage.planner.study_fit import basis_of, fit_points, load_fit, published

    if studies and fit is not None:
        raise UserError("plan: --study and --fit both say what to predict by; give one")
    if fit is not None:
        return basis_of(load_fit(fit))
    return basis_of(fit_points(_points(_judged(studies)))) if studies else published()


def _judged(studies: list[Path]) -> dict[Path, JudgedStudy]:
    """Studies by their directories, each once."""
    from tutelage.analysis.claims.judge import judge_study
    from tutelage.study.results import load_results

    places = dict.fromkeys(find("study", one, "study").resolve() for one in studies)
    return {place: judge_study(load_results(place)) for place in places}


def _points(judged: Mapping[Path, JudgedStudy]) -> StudyPoints:
    from tutelage.analysis.study_points import points_of
    from tutelage.planner.candidates import learned_text
    from tutelage.planner.points import together

    found = []
    for place, study in judged.items():
        untaught = study.results.runs.filter(kind="baseline", status="done")["run"]
        text = learned_text(place, untaught)
        found.append(points_of(study).model_copy(update={"stores": () if text is None else (text,)}))
    return together(found)


def _request(
    asked: tuple[str, str, str],
    price: float | None,
    basis: Basis,
    side: GainSide,
    store: Path | None,
    settings: list[str],
) -> PlanRequest:
    from tutelage.config.load import taken
    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import open_store
    from tutelage.models.flops import parameters
    from tutelage.models.shapes import LADDER
    from tutelage.planner.advice import PlanRequest
    from tutelage.planner.ledger import Prices, find_hardware

    name, tokens, hardware = asked
    shape, devices = lookup(LADDER, name, "--student: the shape"), find_hardware(hardware)
    place = Path("STORE") if store is None else find("store", store, "--store")
    text = None if store is None else open_store(place)
    vocab_size = shape.vocab_size if text is None else text.vocab_size
    if vocab_size is None:
        raise UserError(f"--student {name}: its vocabulary is that of a token store; give --store")
    raw = {"name": "student", "model": {"shape": name}, "data": {"store": str(place)}, "tokens": tokens}
    config = taken(RunConfig, raw, settings)
    try:
        steps = config.steps(parameters(shape, vocab_size).total)
    except ValueError as error:
        raise UserError(f"--tokens {tokens}: {error}") from None
    if side not in basis.surfaces and side != "in_domain":
        raise UserError(
            f"--for {side}: {basis.source} say nothing of that; give --study or --fit of one that does"
        )
    return PlanRequest(
        config=config,
        shape=shape,
        vocab_size=vocab_size,
        tokens=steps * config.global_batch_tokens,
        basis=basis,
        prices=Prices(devices, price),
        side=side,
        text_tokens=None if text is None else text.manifest.splits["train"].tokens,
        notes=(_OTHER_TEXT,)
        if text is not None and basis.stores and text.fingerprint not in basis.stores
        else (),
    )


_OTHER_TEXT = (
    "--store is not the token store that the studies were run on: losses on another text, split or tokenizer "
    "do not compare, and then nothing here holds"
)


@plan_app.command("fit")
def plan_fit(
    study: Studies,
    output: Annotated[Path, typer.Option(help="file of the fit (JSON)")] = Path("fit.json"),
    as_json: AsJson = False,
) -> None:
    """Fit the laws and the rule for alpha to finished studies, and say how far they are off.

    Each is tried on what was left out of it: sizes and budgets one by one, pairs of student and teacher one
    by one.
    """
    from tutelage.cli.bars import say
    from tutelage.cli.plan_output import print_fit
    from tutelage.planner.study_fit import fit_points, save_fit

    judged = _judged(study)
    found = fit_points(_points(judged))
    save_fit(output, found)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
        return
    print_fit(found, [*judged.values()])
    say("fit", output)
    typed = shlex.quote(str(output))
    say("next", f"tutelage plan --fit {typed} --student SHAPE --tokens TOKENS --teacher SHAPE@TOKENS")


@plan_app.command("backtest")
def plan_backtest(study: Studies, as_json: AsJson = False) -> None:
    """Hide each pair of finished studies in turn, let the planner choose, and print its regret.

    Beside it stand always .5, the strongest teacher, and no teacher. All is read from the studies' results.
    """
    from dataclasses import asdict

    from tutelage.cli.plan_output import print_backtest
    from tutelage.planner.backtest import backtest

    points = _points(_judged(study))
    found = backtest(points)
    if as_json:
        sys.stdout.write(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    else:
        print_backtest(found, points)
