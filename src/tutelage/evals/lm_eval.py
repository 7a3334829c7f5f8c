"""Score downstream tasks with lm-eval's evaluator, on the exported model directory.

`lm_eval --model hf --model_args pretrained=DIR,max_length=C` gives the same numbers, except for texts that
are scored from their beginning and for heads with padded rows (`tutelage.evals.lm_eval_model`), in plain text
and in conversations (`tutelage.evals.lm_eval_prompts`). A task is a name of lm-eval's (the paper's sixteen
get the paper's shots and metric) or in a task file of the user's, comes inside a package, or is built from
held-out text (`tutelage.evals.lm_eval_tasks`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from tutelage.data.store import open_store
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError, one_line
from tutelage.evals.domains import DOMAINS, check_sources, domain_store, find_domain
from tutelage.evals.evaluated_model import check_tokenizer, load_evaluated
from tutelage.evals.lm_eval_prepared import (
    OFFLINE,
    SEED,
    OwnTasks,
    TaskLoader,
    check_known,
    quiet,
    task_manager,
)
from tutelage.evals.lm_eval_prompts import PLAIN, Asked, chat_writer, open_tokenizer, tokens_beside
from tutelage.evals.lm_eval_tasks import (
    PACKAGE_TASKS,
    PAPER_TASKS,
    BuiltTask,
    build_package_task,
    build_task,
    held_out_texts,
    seeded,
)
from tutelage.evals.score_files import add_scores, known_scores
from tutelage.evals.token_scores import ScoreEstimate
from tutelage.files import lock, make_directory
from tutelage.installed import install_extra
from tutelage.models.hub import pick_device
from tutelage.names import look_up
from tutelage.progress import NullProgress, staged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from tutelage.data.store import Store
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.lm_eval_model import ChatWriter, ExportedModel
    from tutelage.evals.lm_eval_prepared import Prepared, TaskRow
    from tutelage.evals.lm_eval_prompts import Prompting
    from tutelage.progress import Progress
    from tutelage.types import Score

_BOOTSTRAP = 1000
_ALONE = "DISABLE_MULTIPROC"  # a variable of lm-eval's
_BY_A_METRIC = (ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError)


def check_models(models: Sequence[EvaluatedModel], prompting: Prompting) -> None:
    """Check that every model can be asked, before one of them is.

    Raises:
        UserError: lm-eval is missing, or a tokenizer is incompatible, or has no chat template where one is
            asked for.
    """
    _check_installed()
    for evaluated in models:
        check_tokenizer(evaluated)
        chat_writer(evaluated.model, prompting)


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> None:
    """Check what can be known of tasks without a model and without their data.

    Args:
        tasks: as `run_downstream` takes them.
        include: directory of task files of the user's.

    Raises:
        UserError: lm-eval is missing, a task or a text is unknown, or a task file is none.
    """
    _check_installed()
    own = OwnTasks.read(include)
    own.refuse_taken(tasks)
    names = _expanded(tasks)
    others = [name for name in names if _kind(name) not in OFFLINE]
    check_known(others, task_manager(own.directories, defaults=not {*others} <= {*own.tasks}))
    for name in names:
        kind, _, where = name.partition(":")
        if kind in OFFLINE and where:
            _named_store(name, where)


def run_downstream(
    evaluated: EvaluatedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    stores: Path = Path("evals/stores"),
    include: Path | None = None,
    prompting: Prompting = PLAIN,
    progress: Progress | None = None,
) -> list[Score]:
    """Score a model on tasks and append new scores to its `scores.jsonl`, task by task.

    Existing scores of the same version are not computed again.

    Args:
        evaluated: the model; its trained context is lm-eval's `max_length`.
        tasks: "paper", names of lm-eval (the paper's sixteen with the paper's shots and metric) or of
            `PACKAGE_TASKS`, and "continuation" or "last_word", built from the test split of the run's
            training store, or of any domain or token store: "continuation:kjv",
            "continuation:stores/speeches-1a2b3c4d".
        limit: questions per task, the first ones; None for all.
        batch_size: of the forward passes; scores depend on it by rounding alone.
        device: auto, cpu, cuda or mps.
        stores: directory of the token stores of domains.
        include: directory of task files in lm-eval's format, whose names may stand in `tasks`. Python
            functions that they name are run.
        prompting: how questions are put; what differs from plain text is named in the scores' domains.
        progress: told of every task that is scored; None shows nothing.

    Returns:
        The scores of these tasks, in their order, existing ones included.

    Raises:
        UserError: lm-eval is missing, a task is unknown, its data cannot be loaded, or the model's tokenizer
            is incompatible with it or has no chat template that is asked for; before any compute. Or an
            answer is longer than the model's context.
    """
    progress = progress or NullProgress()
    _check_installed()
    check_tokenizer(evaluated)
    asked = Asked(limit, prompting, chat_writer(evaluated.model, prompting))
    chosen = pick_device(device)
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        prepared = _all_prepared(evaluated, tasks, asked, stores, include)
        model: ExportedModel | None = None
        scores: list[Score] = []
        for task in prepared:
            found = _known(evaluated, task)
            if not found:
                with quiet():
                    if model is None:
                        loaded = load_evaluated(evaluated, chosen, progress)
                        model = _model(evaluated, loaded, batch_size, asked.writer)
                    found = _answered(evaluated, task, model, asked, progress)
                add_scores(evaluated.scores, found)
            scores += found
    return scores


def _known(evaluated: EvaluatedModel, task: Prepared) -> list[Score]:
    """The scores that a task has already; none if one of its rows has none."""
    rows = [known_scores(evaluated.scores, row.version, evaluated.step) for row in task.rows]
    return list(itertools.chain(*rows)) if all(rows) else []


def _answered(
    evaluated: EvaluatedModel, task: Prepared, model: ExportedModel, asked: Asked, progress: Progress
) -> list[Score]:
    """Put the questions of a task, and tell how far that is and what is not seen in the scores."""
    stage = f"{evaluated.id}: {task.name}"
    instances = [one for leaf in task.leaves for one in leaf.instances]
    if task.unheard:
        progress.note(
            f"{stage}: the model's chat template has no place for its description, which is left out"
        )
    model.cut.clear()
    with staged(progress, stage, sum(one.repeats for one in instances), "answers") as told:
        model.tell(told)
        found = list(_scores(evaluated, task, model, asked))
    if model.cut:
        questions = len({(one.task_name, one.doc_id) for one in instances})
        progress.note(
            f"{stage}: {len(model.cut)} of {questions} questions are longer than the model's context of "
            f"{evaluated.context} tokens with an answer, and lost their beginning"
        )
    return found


def _all_prepared(
    evaluated: EvaluatedModel, tasks: Sequence[str], asked: Asked, stores: Path, include: Path | None
) -> list[Prepared]:
    """The tasks that `run_downstream` is asked for, with their data."""
    own = OwnTasks.read(include)
    own.refuse_taken(tasks)
    names = _expanded(tasks)
    built = {name: _built(evaluated, name, stores, asked) for name in names if _kind(name) in OFFLINE}
    directories = [*(task.directory for task in built.values()), *own.directories]
    manager = task_manager(directories, defaults=any(name not in {*built, *own.tasks} for name in names))
    names = list(dict.fromkeys(built[name].name if name in built else name for name in names))
    _check_different(built)
    check_known(names, manager)
    ours = {task.name for task in built.values()}
    loader = TaskLoader(manager, own, asked)
    return [task for name in names for task in loader.prepare(name, on_hub=name not in {*ours, *own.names})]


def _check_installed() -> None:
    try:
        import accelerate  # noqa: F401, PLC0415 - an extra, and slow to import
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise UserError(
            f"downstream tasks: the package '{error.name}' is missing; run: {install_extra('eval')}"
        ) from None


def _expanded(tasks: Sequence[str]) -> list[str]:
    """Every task once, in order."""
    paper = [task.name for task in PAPER_TASKS]
    return list(dict.fromkeys(itertools.chain(*(paper if task == "paper" else [task] for task in tasks))))


def _kind(task: str) -> str:
    return task.partition(":")[0]


def _built(evaluated: EvaluatedModel, task: str, stores: Path, asked: Asked) -> BuiltTask:
    if task in PACKAGE_TASKS:
        return build_package_task(task, evaluated.output / "tasks")
    kind, _, where = task.partition(":")
    store = _text(evaluated, task, where, stores)
    own = load_tokenizer(evaluated.model)
    room = evaluated.context - tokens_beside(own, asked)
    texts, tokenizer = held_out_texts(store), Tokenizer.from_str(own.json)
    return build_task(kind, store.manifest.name, texts, tokenizer, room, evaluated.output / "tasks")


def _text(evaluated: EvaluatedModel, task: str, where: str, stores: Path) -> Store:
    """The token store whose test split a task is built from."""
    if where:
        path = _named_store(task, where)
        if path is not None:
            return open_store(path)
        return domain_store(where, find_domain(where), evaluated.model, stores)
    if evaluated.training_store is None:
        raise UserError(
            f"task {task}: {evaluated.id} has no training store; write {task}:DOMAIN or {task}:STORE"
        )
    return open_store(evaluated.training_store)


def _named_store(task: str, where: str) -> Path | None:
    """The token store that a task names; None if it names a domain, of which all that it needs is there."""
    is_domain = where in DOMAINS and not Path(where).is_dir()
    path = None if is_domain else look_up("store", Path(where), f"task {task}")
    if path is None:
        check_sources({where: find_domain(where)})
    return path


def _check_different(built: dict[str, BuiltTask]) -> None:
    """Raise `UserError` for two tasks of one name, which lm-eval could not tell apart."""
    seen: dict[str, BuiltTask] = {}
    for asked, task in built.items():
        if seen.setdefault(task.name, task) != task:
            raise UserError(f"task {asked}: another text of the same name is asked for; name them one by one")


def _model(
    evaluated: EvaluatedModel, loaded: PreTrainedModel, batch_size: int, writer: ChatWriter | None
) -> ExportedModel:
    from tutelage.evals.lm_eval_model import ExportedModel  # noqa: PLC0415 - an extra, and slow to import

    return ExportedModel(
        load_tokenizer(evaluated.model),
        writer,
        tokenizer=open_tokenizer(evaluated.model),
        pretrained=loaded,  # by us: lm-eval would take NaN, and draw missing weights
        max_length=evaluated.context,
        batch_size=batch_size,
        trust_remote_code=False,
    )


def _scores(evaluated: EvaluatedModel, task: Prepared, model: ExportedModel, asked: Asked) -> Iterator[Score]:
    from lm_eval import evaluate  # noqa: PLC0415 - an extra, and slow to import

    for leaf in task.leaves:
        leaf.set_fewshot_seed(seed=SEED)
    try:
        with torch.random.fork_rng(), seeded(SEED), _in_this_process():
            torch.manual_seed(SEED)
            found = evaluate(
                model,
                task.loaded,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
                **asked.settings,
            )
        measured = [(row, *one) for row in task.rows for one in _metrics(found["results"][row.name])]
    except _BY_A_METRIC as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"task {task.name}: no score by the metrics of its task file ({reason})") from error
    for row, metric, filtered, estimate in measured:
        if task.metric in (None, metric):
            full_name = metric if filtered == "none" else f"{metric},{filtered}"
            n = int(found["results"][row.name]["sample_len"])
            score = evaluated.score(
                row.domain,
                "downstream",
                "test",
                full_name,
                estimate,
                n,
                row.version,
                higher_is_better=_is_better_higher(row, metric, found["higher_is_better"]),
            )
            above = task.rows[: task.rows.index(row)]  # lm-eval lists a group before those in it
            groups = (one for one in above if one.leaves >= row.leaves)
            key = f"{metric},{filtered}"
            summed_by = next((one.domain for one in groups if key in found["results"][one.name]), None)
            yield replace(score, summed_by=summed_by)


def _is_better_higher(row: TaskRow, metric: str, known: Mapping[str, Mapping[str, bool]]) -> bool:
    """The direction of a metric by the tasks of a row that say it; lm-eval has none for groups of groups."""
    said = {known[leaf][metric] for leaf in row.leaves if metric in known[leaf]}
    return said != {False}


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """Keep lm-eval from forking for standard errors: the processes would have models, locks and handlers."""
    before = os.environ.get(_ALONE)
    os.environ[_ALONE] = "1"
    try:
        yield
    finally:
        del os.environ[_ALONE]
        os.environ.update({} if before is None else {_ALONE: before})


def _metrics(row: dict[str, Any]) -> Iterator[tuple[str, str, ScoreEstimate]]:
    """(metric, filter, estimate) from keys such as "acc,none" and "acc_stderr,none"."""
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = row.get(f"{metric}_stderr,{filtered}")
            error = float(stderr) if isinstance(stderr, float) else float("nan")
            yield metric, filtered, ScoreEstimate(float(value), error)
