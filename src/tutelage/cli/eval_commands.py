"""The command `tutelage eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.evals.evaluate import EvalRequest

Stores = Annotated[
    list[str] | None, typer.Option(metavar="NAME=DIR", help="also this token store; may be repeated")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="instead: a downstream task; 'paper', a name of lm-eval's, word_analogy, or continuation or "
        "last_word (:DOMAIN or :STORE); may be repeated"
    ),
]
Compare = Annotated[
    bool, typer.Option("--mechanism", help="instead: on which tokens MODEL gains, and what its teacher knew")
]
Probes = Annotated[
    bool,
    typer.Option("--probes", help="instead: copying in context, drafting for --teacher, samples to read"),
]


def evaluate(
    model: Annotated[list[str], typer.Argument(help="run directories, model directories or Hub names")],
    domain: Annotated[list[str] | None, typer.Option(help="only this domain; may be repeated")] = None,
    suite: Annotated[str | None, typer.Option(help="offline (default) or paper (needs the Hub)")] = None,
    store: Stores = None,
    output: Annotated[Path, typer.Option(help="token stores, and scores of models that are no run")] = Path(
        "evals"
    ),
    max_documents: Annotated[int | None, typer.Option(min=1, help="of a domain's split; default: 50")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="per document; default: 2048")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    task: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="with --task: questions per task")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="with --task: of the forward passes")] = 16,
    mechanism: Compare = False,
    probes: Probes = False,
    teacher: Annotated[str | None, typer.Option(help="with --mechanism or --probes: MODEL's teacher")] = None,
    baseline: Annotated[str | None, typer.Option(help="with --mechanism: the student without one")] = None,
    sorter: Annotated[
        str | None,
        typer.Option(
            help="with --mechanism: an untaught student of another seed, by which tokens are sorted"
        ),
    ] = None,
) -> None:
    """Score models: bits per byte and calibration, in and out of domain, raw and after fitting.

    Beside every raw score stand the scores after fitting a temperature, and a temperature and a share of
    unigram, on other text of the domain: a gain that is gone there was smoothing, not knowledge. The scores
    of a run land in its scores.jsonl; what was scored before is not scored again.

    With --mechanism, one model is compared with its teacher and a baseline token by token: the gain by how
    hard a token is (to --sorter), by position and by who is right. The text is the test split of its training
    store, or what --domain, --suite and --store name.

    With --task, models answer questions: accuracy, by lm-eval's own evaluator. With --probes: how well they
    copy in context, how many of their tokens --teacher would accept as drafts, and samples to read.
    """
    from tutelage.evals.evaluate import EvalRequest, select

    instead = {"--task": bool(task), "--mechanism": mechanism, "--probes": probes}
    _check_options(
        instead, {"--domain": domain, "--suite": suite, "--store": store}, limit, teacher, baseline, sorter
    )
    if task:
        _tasks(model, task, output, limit, batch_size, device)
        return
    named = domain or suite or store or not (mechanism or probes)
    domains, stores = select(domain or [], suite, store or []) if named else ({}, {})
    request = EvalRequest(domains, stores, output, max_documents, max_tokens, device)
    if mechanism:
        _mechanism(model, teacher, baseline, sorter, request)
    elif probes:
        _probes(model, teacher, request)
    else:
        _score(model, request)


def _score(model: list[str], request: EvalRequest) -> None:
    from tutelage.analysis.report.text import print_scores
    from tutelage.analysis.score_warnings import score_warnings
    from tutelage.cli.progress import EvalBar, out
    from tutelage.evals.evaluate import evaluate

    with EvalBar() as bar:
        rows, places = evaluate(model, request, bar)
    print_scores(rows, {name: entry.metric for name, entry in request.domains.items()}, out)
    for warning in score_warnings(rows):
        out.print(f"warning  {warning}", highlight=False, soft_wrap=True)
    for place in places:
        out.print(f"scores   {place}", highlight=False, soft_wrap=True)


def _mechanism(
    model: list[str], teacher: str | None, baseline: str | None, sorter: str | None, request: EvalRequest
) -> None:
    from tutelage.analysis.figures.style import save_all
    from tutelage.analysis.figures.token_figures import comparison_figures
    from tutelage.analysis.report.text import print_token_comparison
    from tutelage.cli.progress import EvalBar, out
    from tutelage.evals.token_comparison import compare_on_texts
    from tutelage.study.token_tables import read_token_comparison

    if len(model) != 1 or teacher is None or baseline is None:
        raise UserError("--mechanism: give one model, --teacher MODEL and --baseline MODEL")
    with EvalBar() as bar:
        directories = compare_on_texts(model[0], teacher, baseline, sorter, request, bar)
    for directory in directories:
        found = read_token_comparison(directory)
        print_token_comparison(found, out)
        save_all(comparison_figures(found), directory / "figures")
        out.print(f"tokens   {directory / 'tokens.parquet'}", highlight=False, soft_wrap=True)
        out.print(f"figures  {directory / 'figures'}\n", highlight=False, soft_wrap=True)
    if sorter is None:
        out.print(
            "next     the same with --sorter, an untaught student of another seed: how much of this is luck?",
            highlight=False,
            soft_wrap=True,
        )


def _check_options(
    instead: Mapping[str, bool],
    texts: Mapping[str, object],
    limit: int | None,
    teacher: str | None,
    baseline: str | None,
    sorter: str | None,
) -> None:
    """Refuse options that do not go together."""
    chosen = [option for option, given in instead.items() if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: one at a time")
    without = {"--task": {"--domain", "--suite", "--store"}, "--probes": {"--domain", "--suite"}}
    for option in chosen:
        extra = [name for name, value in texts.items() if value and name in without.get(option, ())]
        if extra:
            raise UserError(f"{option} does not go with {' and '.join(extra)}; leave that out")
    if limit is not None and not instead["--task"]:
        raise UserError("--limit belongs to --task; for texts there is --max-documents")
    if teacher and not (instead["--mechanism"] or instead["--probes"]):
        raise UserError("--teacher belongs to --mechanism and --probes; give one of them, or leave it out")
    for option, value in (("--baseline", baseline), ("--sorter", sorter)):
        if value and not instead["--mechanism"]:
            raise UserError(f"{option} belongs to --mechanism; give that too, or leave it out")


def _tasks(
    model: list[str], task: list[str], output: Path, limit: int | None, batch_size: int, device: str
) -> None:
    from tutelage.analysis.report.text import print_tasks
    from tutelage.cli.progress import out
    from tutelage.evals.evaluated_model import find_models
    from tutelage.evals.lm_eval import run_downstream

    evaluated_models = find_models(model, output)
    stores = output / "stores"
    scores = [
        score
        for evaluated in evaluated_models
        for score in run_downstream(
            evaluated, task, limit=limit, batch_size=batch_size, device=device, stores=stores
        )
    ]
    print_tasks(scores, "task", "questions", out)
    for evaluated in evaluated_models:
        out.print(f"scores   {evaluated.scores}", highlight=False, soft_wrap=True)


def _probes(model: list[str], teacher: str | None, request: EvalRequest) -> None:
    from tutelage.analysis.report.text import print_tasks
    from tutelage.cli.progress import out
    from tutelage.evals.evaluated_model import find_model, find_models
    from tutelage.evals.probes import run_probes

    if len(request.stores) > 1:
        raise UserError("--probes reads one text; give one --store, or none for a run's own")
    store = next(iter(request.stores.values()), None)
    evaluated_models = find_models(model, request.output)
    judge = find_model(teacher, request.output) if teacher else None
    scores = [
        score
        for evaluated in evaluated_models
        for score in run_probes(evaluated, store=store, teacher=judge, device=request.device)
    ]
    print_tasks(scores, "probe", "sequences or documents", out)
    for evaluated in evaluated_models:
        out.print(f"samples  {evaluated.samples}", highlight=False, soft_wrap=True)
        out.print(f"scores   {evaluated.scores}", highlight=False, soft_wrap=True)
