"""The commands `tutelage eval score`, `tasks`, `tokens`, `probe`, `recall` and `sample`."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tutelage.errors import UserError, suggestion
from tutelage.loading import loading
from tutelage.names import find, kind_of, look_up, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.samples import Continuation
    from tutelage.types import Score


class EvalGroup(TyperGroup):
    """The group `tutelage eval`; a model in the place of the command is answered in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - a class private to typer
        """Check that a command comes first.

        Raises:
            UserError: something else does.
        """
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            raise UserError(
                f"tutelage eval {args[0]}: {suggestion(args[0], self.commands)}a command comes first: "
                f"{', '.join(self.commands)}"
            )
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=EvalGroup, no_args_is_help=True, help="Score models: on texts, on tasks, token by token, by probes."
)

Models = Annotated[
    list[str], typer.Argument(help="runs, studies (all their runs), model directories or Hub names")
]
Domains = Annotated[list[str] | None, typer.Option(help="this domain; may be repeated")]
Suite = Annotated[str | None, typer.Option(help="offline or paper (needs the Hub)")]
NamedStores = Annotated[
    list[str] | None, typer.Option(metavar="NAME=STORE", help="this token store; may be repeated")
]
Output = Annotated[Path, typer.Option(help="token stores, and scores of models that are not runs")]
MaxDocuments = Annotated[int | None, typer.Option(min=1, help="of each text's split; default: 50")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="per document; default: 2048")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]

Include = Annotated[
    Path | None,
    typer.Option(
        help="directory of lm-eval task files of your own (*.yaml); functions that they name are run"
    ),
]
InConversations = Annotated[
    bool, typer.Option("--apply-chat-template", help="ask in conversations, by the models' chat template")
]
TemplateName = Annotated[
    str | None, typer.Option(metavar="NAME", help="the same, by one of several templates that models have")
]
SystemInstruction = Annotated[str | None, typer.Option(metavar="TEXT", help="said before everything else")]
Multiturn = Annotated[
    bool, typer.Option(help="worked examples as turns of a conversation, else in one turn with the question")
]

_EVALS = Path("evals")


def _each(models: Sequence[str]) -> list[str]:
    """The models, with those of its finished runs in the place of a study."""
    from tutelage.cli.bars import say
    from tutelage.study.plan import models_of

    found: list[str] = []
    for one in models:
        path = Path(one).expanduser()
        named = None if path.exists() or look_up("run", path, "model") else look_up("study", path, "model")
        study = named or (path if kind_of(path) == "study" else None)
        runs, others = ([one], 0) if study is None else models_of(study)
        found += map(str, runs)
        if others:
            say("note", f"{study}: {others} runs have no finished model here and are left out")
    return found


def _texts_of_studies(models: Sequence[EvaluatedModel]) -> dict[str, tuple[Path, Path | None]]:
    """By the id of each run of a study, the study and the text that its runs are asked about."""
    from tutelage.study.plan import corpus_of

    places = {one.id: one.output.absolute().parent.parent for one in models}
    texts: dict[Path, Path | None] = {}
    for place in {*places.values()}:
        with suppress(UserError):  # there is no plan, or what is called so is none of a study
            texts[place] = corpus_of(place)
    return {run: (place, texts[place]) for run, place in places.items() if place in texts}


@eval_app.command("score")
def score(
    model: Models,
    domain: Domains = None,
    suite: Suite = None,
    store: NamedStores = None,
    output: Output = _EVALS,
    max_documents: MaxDocuments = None,
    max_tokens: MaxTokens = None,
    device: DeviceName = "auto",
) -> None:
    """Score models on texts: bits per byte and calibration, in and out of domain, raw and after fitting.

    Beside every raw score stand the scores after fitting a temperature, and a temperature and a share of
    unigram, on other text of the domain: a gain that is gone there was smoothing, not knowledge. The scores
    of a run land in its scores.jsonl; what was scored before is not scored again. Without --domain, --suite
    or --store, the texts are those of the offline suite.
    """
    from tutelage.analysis.report.text import print_scores
    from tutelage.analysis.words import score_warnings
    from tutelage.cli.bars import RichProgress, out, say

    with loading():
        from tutelage.evals.evaluate import EvalRequest, evaluate, select

    domains, stores = select(domain or [], suite, store or [])
    request = EvalRequest(domains, stores, output, max_documents, max_tokens, device)
    with RichProgress() as progress:
        scores, places = evaluate(_each(model), request, progress)
    rows = [asdict(one) for one in scores]
    print_scores(rows, {name: entry.metric for name, entry in domains.items()}, out)
    for warning in score_warnings(rows):
        say("warning", warning)
    for place in places:
        say("scores", place)
    if taught := [place.parent.name for place in places if _is_taught(place.parent)]:
        student = shlex.quote(taught[0])
        say("next", f"`tutelage eval tokens {student} --teacher ... --baseline ...`: where its teacher helps")
    else:
        say("next", "`tutelage eval probe` with the same models: how well they copy, and samples to read")


def _is_taught(directory: Path) -> bool:
    from tutelage.run_directory import RunDirectory

    return kind_of(directory) == "run" and RunDirectory(directory).config().teacher is not None


@eval_app.command("tasks")
def tasks(
    model: Models,
    task: Annotated[
        list[str],
        typer.Option(
            help="paper, a name of lm-eval's, word_analogy, or continuation or last_word (:DOMAIN or :STORE)"
            ", or of --include; may be repeated"
        ),
    ],
    include: Include = None,
    apply_chat_template: InConversations = False,
    chat_template: TemplateName = None,
    system_instruction: SystemInstruction = None,
    fewshot_as_multiturn: Multiturn = True,
    limit: Annotated[int | None, typer.Option(min=1, help="questions per task; default: all")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="of the forward passes")] = 16,
    output: Output = _EVALS,
    device: DeviceName = "auto",
) -> None:
    """Ask models questions: accuracy on downstream tasks, by lm-eval's own evaluator."""
    from tutelage.cli.bars import RichProgress

    with loading():
        from tutelage.evals.evaluated_model import find_models
        from tutelage.evals.lm_eval import check_models, run_downstream
        from tutelage.evals.lm_eval_prompts import Prompting
        from tutelage.evals.lm_eval_tasks import KINDS

    prompting = Prompting(
        chat=apply_chat_template or chat_template is not None,
        template=chat_template,
        multiturn=fewshot_as_multiturn,
        system=system_instruction or None,
    )
    scores: list[Score] = []
    found = find_models(_each(model), output)
    check_models(found, prompting)
    texts = _texts_of_studies(found)
    with RichProgress() as progress:
        for one in found:
            _, text = texts.get(one.id, (None, None))
            scores += run_downstream(
                one,
                [f"{name}:{text}" if text is not None and name in KINDS else name for name in task],
                limit=limit,
                batch_size=batch_size,
                device=device,
                stores=output / "stores",
                include=include,
                prompting=prompting,
                progress=progress,
            )
    files = [("scores", one.scores) for one in found]
    hint = "`tutelage eval score` measures the same models on texts"
    for study, _ in [*texts.values()][:1]:
        hint = f"`tutelage report {shlex.quote(typed('study', study))}` shows these tasks too"
    _print_tasks(scores, "task", "questions", files, hint)


@eval_app.command("tokens")
def tokens(
    student: Annotated[str, typer.Argument(help="name or directory of a run, model directory or Hub name")],
    teacher: Annotated[str, typer.Option(help="the student's teacher")],
    baseline: Annotated[str, typer.Option(help="the same student without a teacher")],
    sorter: Annotated[
        str | None, typer.Option(help="an untaught student of another seed, by which tokens are sorted")
    ] = None,
    domain: Domains = None,
    suite: Suite = None,
    store: NamedStores = None,
    output: Output = _EVALS,
    max_documents: MaxDocuments = None,
    max_tokens: MaxTokens = None,
    device: DeviceName = "auto",
) -> None:
    """Compare a student with its teacher and a baseline token by token: where does the teacher help?

    The gain is shown by how hard a token is (to --sorter), by position and by who is right. The text is the
    test split of the student's training store, or what --domain, --suite and --store name.
    """
    from tutelage.analysis.figures.style import save_all
    from tutelage.analysis.figures.token_figures import comparison_figures
    from tutelage.analysis.report.text import print_token_comparison
    from tutelage.cli.bars import RichProgress, out, say
    from tutelage.study.token_tables import read_token_comparison

    with loading():
        from tutelage.evals.evaluate import EvalRequest, select
        from tutelage.evals.token_comparison import compare_on_texts

    domains, stores = select(domain or [], suite, store or []) if domain or suite or store else ({}, {})
    request = EvalRequest(domains, stores, output, max_documents, max_tokens, device)
    with RichProgress() as progress:
        directories = compare_on_texts(
            student, teacher, baseline, sorter, request, output / "stores", progress
        )
    for directory in directories:
        found = read_token_comparison(directory)
        print_token_comparison(found, out)
        save_all(comparison_figures(found), directory / "figures")
        say("tokens", directory / "tokens.parquet")
        say("figures", directory / "figures")
    if sorter is None:
        say("next", "the same with --sorter, an untaught student of another seed: how much of this is luck?")


@eval_app.command("probe")
def probe(
    model: Models,
    teacher: Annotated[
        str | None, typer.Option(help="also: how many of the models' tokens this one would accept as drafts")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="token store that gives the text; default: a run's own")
    ] = None,
    output: Output = _EVALS,
    device: DeviceName = "auto",
) -> None:
    """Probe models: how well they copy in context, drafting for --teacher, and samples to read."""
    from tutelage.cli.bars import RichProgress

    with loading():
        from tutelage.evals.evaluated_model import find_model, find_models
        from tutelage.evals.probes import run_probes

    found = find_models(_each(model), output)
    judge = find_model(teacher, output) if teacher else None
    store = find("store", store, "--store") if store else None
    with RichProgress() as progress:
        scores = [
            row
            for one in found
            for row in run_probes(one, store=store, teacher=judge, device=device, progress=progress)
        ]
    files = [
        (name, path) for one in found for name, path in (("samples", one.samples), ("scores", one.scores))
    ]
    _print_tasks(scores, "probe", "sequences or documents", files, "read the samples")


@eval_app.command("recall")
def recall(
    model: Models,
    store: Annotated[
        Path | None, typer.Option(help="token store whose facts are asked for; default: a run's own")
    ] = None,
    output: Output = _EVALS,
    device: DeviceName = "auto",
) -> None:
    """Ask models for facts of their training text, by how often a run has read them.

    A question is four words of the text and four answers to choose from; chance is 1 in 4, whatever a model
    prefers. The controls are facts that a run has not read (0) and facts of the test split (held out). For
    models that are no runs, all of the training split counts as read, once.
    """
    from tutelage.cli.bars import RichProgress

    with loading():
        from tutelage.evals.evaluated_model import find_models
        from tutelage.evals.recall import run_recall

    found = find_models(_each(model), output)
    store = find("store", store, "--store") if store else None
    with RichProgress() as progress:
        scores = [
            row
            for one in found
            for row in run_recall(one, output / "stores", progress, store=store, device=device)
        ]
    _print_tasks(
        scores,
        "recall",
        "questions",
        [("scores", one.scores) for one in found],
        "compare a student with its untaught twin: both have read the same text",
    )


@eval_app.command("sample")
def sample(
    model: Models,
    prompt: Annotated[list[str], typer.Option(help="text to go on from; may be repeated")],
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="as a user's turn, by the models' chat template"),
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the most probable")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="draw among the most probable tokens of this share")
    ] = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="continuations of each prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="of the first draw")] = 0,
    device: DeviceName = "auto",
) -> None:
    """Let models go on from prompts, side by side: what does each of them write?

    A prompt begins a document. Every draw has a seed of its own, the same for all models. Nothing is written
    to disk; `tutelage eval probe` keeps samples of held-out text.
    """
    from tutelage.cli.bars import RichProgress, say

    with loading():
        from tutelage.evals import samples
        from tutelage.evals.evaluated_model import find_models

    sampling = samples.Sampling(tokens, temperature, top_p, draws, seed, apply_chat_template)
    with RichProgress() as progress:
        found = samples.sample(find_models(_each(model), _EVALS), prompt, sampling, device, progress)
    _print_samples(found)
    if cut := list(dict.fromkeys(one.model for one in found if one.at_context)):
        say("note", f"{' and '.join(cut)}: ended where the sequences end that the model was trained on")
    say("next", "`tutelage eval score` with the same models: what they are worth, in numbers")


def _print_samples(found: Sequence[Continuation]) -> None:
    """Print what models wrote, below each prompt a row for each model and draw."""
    from rich.table import Table
    from rich.text import Text

    from tutelage.cli.bars import out

    for prompt in dict.fromkeys(one.prompt for one in found):
        below = [one for one in found if one.prompt == prompt]
        numbered = len({one.seed for one in below}) > 1
        table = Table(box=None, pad_edge=False)
        for head in ("model", "seed") if numbered else ("model",):
            table.add_column(head, overflow="fold")
        table.add_column(Text(prompt), overflow="fold")
        for one in below:
            table.add_row(one.model, *([str(one.seed)] if numbered else []), Text(one.text))
        out.print(table)
        out.print()


def _print_tasks(scores: list[Score], what: str, unit: str, files: list[tuple[str, Path]], hint: str) -> None:
    from tutelage.analysis.report.text import print_tasks
    from tutelage.cli.bars import out, say

    print_tasks(scores, what, unit, out)
    for name, path in files:
        say(name, path)
    say("next", hint)
