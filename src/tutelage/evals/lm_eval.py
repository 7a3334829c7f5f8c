"""Score downstream tasks with lm-eval's evaluator, on the exported model directory.

`lm_eval --model hf --model_args pretrained=DIR,max_length=C` gives the same numbers, except for texts that
are scored from their beginning and for heads with padded rows (`tutelage.evals.lm_eval_model`). A task is a
name of lm-eval's (the paper's sixteen get the paper's shots and metric) or in a task file of the user's,
comes inside a package, or is built from held-out text (`tutelage.evals.lm_eval_tasks`).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tokenizers import Tokenizer
from transformers.utils import logging as transformers_logging

from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.data.tokenizer import load_tokenizer
from tutelage.errors import UserError, one_line, suggestion
from tutelage.evals.domains import DOMAINS, check_sources, domain_store, find_domain
from tutelage.evals.evaluated_model import check_tokenizer, load_evaluated
from tutelage.evals.lm_eval_tasks import (
    KINDS,
    PACKAGE_TASKS,
    PAPER_TASKS,
    BuiltTask,
    build_package_task,
    build_task,
    held_out_texts,
    seeded,
)
from tutelage.evals.score_files import add_scores, known_scores, version_of
from tutelage.evals.token_scores import ScoreEstimate
from tutelage.files import lock, make_directory, read_bytes
from tutelage.hub_access import reading_hub
from tutelage.installed import install_extra
from tutelage.models.hub import pick_device
from tutelage.names import look_up
from tutelage.progress import NullProgress, staged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from tutelage.data.store import Store
    from tutelage.evals.evaluated_model import EvaluatedModel
    from tutelage.evals.lm_eval_model import ExportedModel
    from tutelage.progress import Progress
    from tutelage.types import Score

_SEED = 1234  # lm-eval's own, so that few-shot examples are those of its command line
_BOOTSTRAP = 1000
_BY_A_METRIC = (ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError)
_OFFLINE = (*KINDS, *PACKAGE_TASKS)


@dataclass(frozen=True, slots=True)
class _OwnTasks:
    """Task files that the user wrote.

    Attributes:
        directories: that hold them: one, or none.
        tasks: their names.
        names: of tasks, and of groups and tags, which may be made of lm-eval's own tasks.
        digest: of the content of all files, because a task is not known by its questions alone.
    """

    directories: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    digest: str = ""

    @classmethod
    def read(cls, directory: Path | None) -> _OwnTasks:
        """Read the task files of a directory and of those in it.

        Raises:
            UserError: there are none, or one is no YAML, which lm-eval would skip without a word.
        """
        if directory is None:
            return cls()
        files = sorted(directory.glob("**/*.yaml"))
        if not files:
            raise UserError(f"--include {directory}: no such directory, or none with task files (*.yaml)")
        content = []
        for path in (*files, *directory.glob("**/*.py")):
            try:
                content.append((path.name, read_bytes(path).decode()))
                if path.suffix == ".yaml":
                    yaml.compose(content[-1][1])
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                what = "no YAML" if path.suffix == ".yaml" else "no Python"
                raise UserError(f"--include {path}: {what}: {one_line(error)}") from None
        manager = _manager([directory], defaults=False)
        return cls(
            (directory,), tuple(manager.all_subtasks), tuple(manager.all_tasks), digest(sorted(content))
        )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A task with its data loaded.

    Attributes:
        name: domain of the scores.
        loaded: the tasks for lm-eval, and the group they form, if any.
        metric: the only metric to keep; None for all.
        version: covers every text that the model is shown and every right answer.
    """

    name: str
    loaded: TaskDict
    metric: str | None
    version: str

    @property
    def leaves(self) -> list[Task]:
        """The tasks without their group."""
        return list(self.loaded["tasks"].values())


def run_downstream(
    evaluated: EvaluatedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    stores: Path = Path("evals/stores"),
    include: Path | None = None,
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
        progress: told of every task that is scored; None shows nothing.

    Returns:
        The scores of these tasks, in their order, existing ones included.

    Raises:
        UserError: lm-eval is missing, a task is unknown, its data cannot be loaded, or the model's tokenizer
            is incompatible with it; before any compute. Or an answer is longer than the model's context.
    """
    _check_installed()
    progress = progress or NullProgress()
    check_tokenizer(evaluated)
    chosen = str(pick_device(device))
    make_directory(evaluated.output)
    with lock(evaluated.output / "lock", str(evaluated.output)):
        prepared = _all_prepared(evaluated, tasks, limit, stores, include)
        model: ExportedModel | None = None
        scores: list[Score] = []
        for task in prepared:
            found = known_scores(evaluated.scores, task.version, evaluated.step)
            if not found:
                stage = f"{evaluated.id}: {task.name}"
                with _quiet():
                    model = model or _model(evaluated, batch_size, chosen)
                    asked = sum(len(leaf.instances) for leaf in task.leaves)
                    with staged(progress, stage, asked, "answers") as told:
                        model.tell(told)
                        found = list(_scores(evaluated, task, model, limit))
                add_scores(evaluated.scores, found)
            scores += found
    return scores


def _all_prepared(
    evaluated: EvaluatedModel, tasks: Sequence[str], limit: int | None, stores: Path, include: Path | None
) -> list[_Prepared]:
    """The tasks that `run_downstream` is asked for, with their data."""
    own = _OwnTasks.read(include)
    names = _expanded(tasks)
    built = {name: _built(evaluated, name, stores) for name in names if _kind(name) in _OFFLINE}
    directories = [*(task.directory for task in built.values()), *own.directories]
    manager = _manager(directories, defaults=any(name not in {*built, *own.tasks} for name in names))
    names = list(dict.fromkeys(built[name].name if name in built else name for name in names))
    _check_different(built)
    _check_known(names, manager)
    ours = {task.name for task in built.values()}
    return [_prepared(name, manager, limit, own, on_hub=name not in {*ours, *own.names}) for name in names]


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


def _built(evaluated: EvaluatedModel, task: str, stores: Path) -> BuiltTask:
    if task in PACKAGE_TASKS:
        return build_package_task(task, evaluated.output / "tasks")
    kind, _, where = task.partition(":")
    store = _text(evaluated, task, where, stores)
    own = load_tokenizer(evaluated.model)
    room = evaluated.context - len(own.begin_ids)
    texts, tokenizer = held_out_texts(store), Tokenizer.from_str(own.json)
    return build_task(kind, store.manifest.name, texts, tokenizer, room, evaluated.output / "tasks")


def _text(evaluated: EvaluatedModel, task: str, where: str, stores: Path) -> Store:
    """The token store whose test split a task is built from."""
    if where:
        is_domain = where in DOMAINS and not Path(where).is_dir()
        path = None if is_domain else look_up("store", Path(where), f"task {task}")
        if path is not None:
            return open_store(path)
        domain = find_domain(where)
        check_sources({where: domain})
        return domain_store(where, domain, evaluated.model, stores)
    if evaluated.training_store is None:
        raise UserError(
            f"task {task}: {evaluated.id} has no training store; write {task}:DOMAIN or {task}:STORE"
        )
    return open_store(evaluated.training_store)


def _check_different(built: dict[str, BuiltTask]) -> None:
    """Raise `UserError` for two tasks of one name, which lm-eval could not tell apart."""
    seen: dict[str, BuiltTask] = {}
    for asked, task in built.items():
        if seen.setdefault(task.name, task) != task:
            raise UserError(f"task {asked}: another text of the same name is asked for; name them one by one")


def _manager(directories: list[Path], *, defaults: bool) -> TaskManager:
    """lm-eval's index of tasks; its own 14,000 take seconds to read."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra, and slow to import

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=[str(path) for path in directories], include_defaults=defaults)


def _check_known(names: Sequence[str], manager: TaskManager) -> None:
    for name in names:
        if name not in manager.all_tasks:
            hint = suggestion(name, ["paper", *_OFFLINE, *manager.all_tasks])
            raise UserError(
                f"task {name!r} is unknown; {hint}`lm-eval ls tasks` lists them, and --include DIRECTORY "
                "adds task files of your own"
            )


def _prepared(
    name: str, manager: TaskManager, limit: int | None, own: _OwnTasks, *, on_hub: bool
) -> _Prepared:
    """Load a task's data, and set its shots and version."""
    from datasets import disable_progress_bars  # noqa: PLC0415 - an extra, and slow to import

    disable_progress_bars()
    is_own = name in own.names
    paper = None if is_own else next((task for task in PAPER_TASKS if task.name == name), None)
    here = f"{', '.join(_OFFLINE)} need no Hub"
    access = reading_hub(f"task {name}: its data", f"choose another ({here})", explains=False)
    try:
        with access if on_hub else contextlib.nullcontext(), seeded(_SEED), _quiet():
            loaded = manager.load([name])
            leaves = list(loaded["tasks"].values())
            for task in leaves:
                if paper is not None:
                    task.set_config(key="num_fewshot", value=paper.shots)
                elif task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
            shown = [_shown(task, limit) for task in leaves]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a task file and its data can be wrong in any way
        reason = f"{type(error).__name__}: {one_line(error)}"
        hint = f"look into its file in {own.directories[0]}" if is_own else here
        raise UserError(f"task {name}: its data cannot be loaded ({reason}); {hint}") from None
    return _Prepared(
        name=name,
        loaded=loaded,
        metric=None if paper is None else paper.metric,
        version=version_of([name, *shown, *([own.digest] if is_own else [])]),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bars of lm-eval, which has no switch for all of them, and what it and transformers print."""
    from tqdm import tqdm  # noqa: PLC0415 - comes with lm-eval

    make, verbosity = tqdm.__init__, transformers_logging.get_verbosity()

    def hidden(bar: tqdm, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - tqdm's own
        make(bar, *arguments, **settings | {"disable": True})

    tqdm.__init__ = hidden
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = make
        transformers_logging.set_verbosity(verbosity)


def _shown(task: Task, limit: int | None) -> list[str]:
    """Version and metrics, and a digest of every question as the model sees it and of every answer."""
    task.set_fewshot_seed(seed=_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    metrics = sorted(task.higher_is_better())
    texts = [[instance.args, task.doc_to_target(instance.doc)] for instance in task.instances]
    bare = any(one.request_type == "loglikelihood" and not one.args[0] for one in task.instances)
    return [str(task.VERSION), *metrics, digest(texts), *["answers whole without a prompt"] * bare]


def _model(evaluated: EvaluatedModel, batch_size: int, device: str) -> ExportedModel:
    from tutelage.evals.lm_eval_model import ExportedModel  # noqa: PLC0415 - an extra, and slow to import

    return ExportedModel(
        load_tokenizer(evaluated.model),
        pretrained=load_evaluated(evaluated, device),  # lm-eval would take NaN, and draw missing weights
        max_length=evaluated.context,
        batch_size=batch_size,
        trust_remote_code=False,
    )


def _scores(
    evaluated: EvaluatedModel, task: _Prepared, model: ExportedModel, limit: int | None
) -> Iterator[Score]:
    from lm_eval import evaluate  # noqa: PLC0415 - an extra, and slow to import

    for leaf in task.leaves:
        leaf.set_fewshot_seed(seed=_SEED)
    try:
        with torch.random.fork_rng(), seeded(_SEED):
            torch.manual_seed(_SEED)
            found = evaluate(model, task.loaded, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False)
    except _BY_A_METRIC as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"task {task.name}: no score by the metrics of its task file ({reason})") from error
    names = [task.name] if task.name in found["results"] else [leaf.task_name for leaf in task.leaves]
    for name in names:
        row, directions = found["results"][name], found["higher_is_better"][name]
        for metric, filtered, estimate in _metrics(row):
            if task.metric in (None, metric):
                full_name = metric if filtered == "none" else f"{metric},{filtered}"
                better = directions.get(metric) is not False
                n, version = int(row["sample_len"]), task.version
                yield evaluated.score(
                    name, "downstream", "test", full_name, estimate, n, version, higher_is_better=better
                )


def _metrics(row: dict[str, Any]) -> Iterator[tuple[str, str, ScoreEstimate]]:
    """(metric, filter, estimate) from keys such as "acc,none" and "acc_stderr,none"."""
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = row.get(f"{metric}_stderr,{filtered}")
            error = float(stderr) if isinstance(stderr, float) else float("nan")
            yield metric, filtered, ScoreEstimate(float(value), error)
