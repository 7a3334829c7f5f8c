"""Load tasks of lm-eval with their data, and identify what a model is shown and how it is judged."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from transformers.utils import logging as transformers_logging

from tutelage.config.load import digest
from tutelage.errors import UserError, one_line, suggestion
from tutelage.evals.lm_eval_tasks import KINDS, PACKAGE_TASKS, PAPER_TASKS, seeded
from tutelage.evals.score_files import version_of
from tutelage.files import NO_SPACE, read_bytes
from tutelage.hub_access import reading_hub

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

    from tutelage.evals.lm_eval_prompts import Asked
    from tutelage.evals.lm_eval_tasks import PaperTask

SEED = 1234
"""lm-eval's own, so that few-shot examples are those of its command line."""

OFFLINE = (*KINDS, *PACKAGE_TASKS)
"""Kinds and names of the tasks that need no Hub."""


@dataclass(frozen=True, slots=True)
class OwnTasks:
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
    def read(cls, directory: Path | None) -> OwnTasks:
        """Read the task files of a directory and of those in it, and the files that they include.

        Raises:
            UserError: there are none, or one is no YAML, which lm-eval would skip without a word.
        """
        if directory is None:
            return cls()
        files = sorted(directory.glob("**/*.yaml"))
        if not files:
            raise UserError(f"include {directory}: no such directory, or none with task files (*.yaml)")
        content: dict[Path, str] = {}
        waiting = [*files, *sorted(directory.glob("**/*.py"))]
        while waiting:
            if (path := waiting.pop()).resolve() not in content:
                content[path.resolve()], included = _read(path)
                waiting += included
        manager = task_manager([directory], defaults=False)
        known = sorted((path.name, text) for path, text in content.items())
        return cls((directory,), tuple(manager.all_subtasks), tuple(manager.all_tasks), digest(known))

    def refuse_taken(self, asked: Sequence[str]) -> None:
        """Raise `UserError` if a name that is asked for is that of a task here and of one built otherwise."""
        for name in asked:
            if name in self.names and (name == "paper" or name.partition(":")[0] in KINDS):
                raise UserError(
                    f"task {name}: a task of that name in {self.directories[0]} would not be asked, because "
                    "the name means something else here (--task in --help); rename it"
                )


_NAMES = ("task", "group", "tag")
_NO_TEXT = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "timestamp")]


def _read(path: Path) -> tuple[str, list[Path]]:
    """The text of a task file, or of a Python file beside one, and the files that it includes."""
    what = "no Python" if path.suffix == ".py" else "no YAML"
    try:
        text = read_bytes(path).decode()
        node = None if path.suffix == ".py" else yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"include {path}: {what}: {one_line(error)}") from None
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in pairs:  # lm-eval would sort names, of which one is a number
        if key.value in _NAMES and value.tag in _NO_TEXT:
            raise UserError(f"include {path}: {key.value}: {value.value} is no text; write '{value.value}'")
    values = [value for key, value in pairs if key.value == "include"]
    nodes = [one for value in values for one in (value.value if value.id == "sequence" else [value])]
    included = [path.parent / one.value for one in nodes]
    return text, [*included, *(python for one in included for python in one.parent.glob("*.py"))]


class TaskRow(NamedTuple):
    """What has scores of its own: a task, or a group that sums up tasks.

    Attributes:
        name: in lm-eval's results.
        domain: of its scores.
        version: of its scores.
        leaves: names of the tasks: its own alone, or those of the group and of groups in it.
    """

    name: str
    domain: str
    version: str
    leaves: frozenset[str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tasks that are scored together, with their data loaded.

    Attributes:
        name: of the task, or of the group that they form.
        loaded: the same for lm-eval.
        rows: groups that sum up their tasks, and the tasks; of a group of the paper itself alone. A version
            covers every text that the model is shown, every right answer, and the user's files.
        metric: the only metric to keep; None for all.
        unheard: whether a chat template leaves out the description of a task.
    """

    name: str
    loaded: TaskDict
    rows: tuple[TaskRow, ...]
    metric: str | None = None
    unheard: bool = False

    @property
    def leaves(self) -> list[Task]:
        """The tasks without their group."""
        return list(self.loaded["tasks"].values())


def task_manager(directories: Sequence[Path], *, defaults: bool) -> TaskManager:
    """lm-eval's index of the tasks in these directories, before its own of the same names."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra, and slow to import

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(path) for path in directories], include_defaults=False)
    if defaults:
        for name, entry in _tasks_of_lm_eval().items():
            manager.task_index.setdefault(name, entry)
    return manager


@functools.cache
def _tasks_of_lm_eval() -> Mapping[str, object]:
    """lm-eval's own 14,000 tasks; read once, because it takes seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an extra, and slow to import

    index: dict[str, object] = TaskManager().task_index
    return index


def check_known(names: Sequence[str], manager: TaskManager) -> None:
    """Raise `UserError` for a name that lm-eval does not know."""
    known = manager.task_index
    for name in names:
        if name not in known:
            hint = suggestion(name, ["paper", *OFFLINE, *sorted(known)])
            if {*name.split(",")} <= {*known}:
                hint = "give --task once for each; "
            raise UserError(
                f"task {name!r} is unknown; {hint}`lm-eval ls tasks` lists them, and --include DIRECTORY "
                "adds task files of your own"
            )


def _first(error: Exception) -> Exception:
    """What an error was raised from, of which `datasets` says only that it could not make a data set."""
    from datasets.exceptions import DatasetGenerationError  # noqa: PLC0415 - an extra, and slow to import

    cause = error.__cause__
    return cause if isinstance(error, DatasetGenerationError) and isinstance(cause, Exception) else error


def _unkept(error: Exception) -> str | None:
    """What to do where `datasets` has no place for what it reads; None where that is not what is wrong."""
    from datasets import config  # noqa: PLC0415 - an extra, and slow to import

    cache = Path(config.HF_DATASETS_CACHE)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"`datasets` keeps data in {cache}: free some space there, or set HF_HOME to another disk"
    failed = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else None
    if failed is None or not (failed.is_relative_to(cache) or cache.is_relative_to(failed)):
        return None
    return f"`datasets` keeps data in {cache}: set HF_HOME to a directory that can be written"


@dataclass(frozen=True, slots=True)
class TaskLoader:
    """Loads tasks with their data, and sets their shots and versions.

    Attributes:
        manager: knows the tasks.
        own: the user's task files.
        asked: which questions are asked, and how.
    """

    manager: TaskManager
    own: OwnTasks
    asked: Asked

    def prepare(self, name: str, *, on_hub: bool) -> list[Prepared]:
        """Load a task, or the tasks of a group or tag: one each, but all of a group that sums up its tasks.

        Args:
            name: of the task, group or tag.
            on_hub: whether its data comes from there.

        Raises:
            UserError: its data cannot be loaded, or it is of a kind that is not asked here.
        """
        paper = None
        if name not in self.own.names:
            paper = next((task for task in PAPER_TASKS if task.name == name), None)
        if self.asked.writer is not None:
            self.asked.writer.unheard = False
        loaded, shown = self._load(name, paper, on_hub=on_hub)
        leaves = loaded["tasks"]
        metric = None if paper is None else paper.metric
        unheard = self.asked.writer is not None and self.asked.writer.unheard
        single = {leaf: self._row(leaf, [task], shown) for leaf, task in leaves.items()}
        groups = [group for group in loaded["groups"].values() if _sums_up(group)]
        if not groups:
            return [
                Prepared(leaf, {"tasks": {leaf: task}}, (single[leaf],), metric, unheard)
                for leaf, task in leaves.items()
            ]
        rows = [
            *(self._row(group.name, group.get_all_tasks(), shown) for group in groups),
            *single.values(),
        ]
        kept = rows if paper is None else [row for row in rows if row.name == name]
        return [Prepared(name, loaded, tuple(kept), metric, unheard)]

    def _load(
        self, name: str, paper: PaperTask | None, *, on_hub: bool
    ) -> tuple[TaskDict, dict[str, list[str]]]:
        """The tasks, and by their names what versions are made of."""
        from datasets import disable_progress_bars  # noqa: PLC0415 - an extra, and slow to import

        disable_progress_bars()
        is_own = name in self.own.names
        here = f"{', '.join(OFFLINE)} need no Hub"
        access = reading_hub(f"task {name}: its data", f"choose another ({here})", explains=False)
        try:
            with access if on_hub else contextlib.nullcontext(), seeded(SEED), quiet():
                loaded = self.manager.load([name])
                for task in loaded["tasks"].values():
                    _check_kind(task)
                    if paper is not None:
                        task.set_config(key="num_fewshot", value=paper.shots)
                    elif task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                shown = {leaf: self._shown(task) for leaf, task in loaded["tasks"].items()}
                if is_own:
                    shown = {leaf: [*shown[leaf], *_judged(task)] for leaf, task in loaded["tasks"].items()}
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a task file and its data can be wrong in any way
            first = _first(error)
            reason = f"{type(first).__name__}: {one_line(first)}"
            hint = f"look into its file in {self.own.directories[0]}" if is_own else here
            hint = _unkept(first) or hint
            is_empty = isinstance(first, StopIteration)  # of `datasets`, which looks for a first row
            what = "one of its data files has no rows" if is_empty else "its data cannot be loaded"
            raise UserError(f"task {name}: {what} ({reason}); {hint}") from None
        return loaded, shown

    def _shown(self, task: Task) -> list[str]:
        """Version and metrics, and a digest of every question as the model sees it and of every answer."""
        task.set_fewshot_seed(seed=SEED)
        template = None if self.asked.writer is None else self.asked.writer.apply_chat_template
        task.build_all_requests(rank=0, world_size=1, chat_template=template, **self.asked.settings)
        metrics = sorted(task.higher_is_better())
        texts = [[instance.args, task.doc_to_target(instance.doc)] for instance in task.instances]
        bare = any(one.request_type == "loglikelihood" and not one.args[0] for one in task.instances)
        return [str(task.VERSION), *metrics, digest(texts), *["answers whole without a prompt"] * bare]

    def _row(self, name: str, tasks: Sequence[Task], shown: Mapping[str, Sequence[str]]) -> TaskRow:
        domain = self.asked.prompting.domain(name, tasks)
        texts = [text for task in tasks for text in shown[task.get_config("task")]]
        leaves = frozenset(task.get_config("task") for task in tasks)
        files = [self.own.digest] if {name, *leaves} & {*self.own.names} else []
        return TaskRow(name, domain, version_of([domain, *texts, *files]), leaves)


def _sums_up(group: Group) -> bool:
    """Whether one of its tasks has a metric of which the group is to have a score; else it never has any."""
    metrics = [metric for task in group.get_all_tasks() for metric in task.higher_is_better()]
    return any(wanted.metric in metrics for wanted in group.aggregate_metric_list or ())


def _check_kind(task: Task) -> None:
    """Refuse a task before any compute that lm-eval would refuse after it, or run without asking."""
    if task.get_config("unsafe_code"):
        raise UserError(
            f"task {task.get_config('task')}: runs code that the model writes, which is not done here; "
            "`lm_eval --confirm_run_unsafe_code` does it with the same model directory"
        )
    if task.get_config("doc_to_image") or task.get_config("doc_to_audio"):
        raise UserError(
            f"task {task.get_config('task')}: shows pictures or sounds, and models here read text alone"
        )


def _judged(task: Task) -> list[str]:
    """A digest of what else the scores of a task file depend on: repeats, filters, metrics, data."""
    settings = [task.get_config(key) for key in ("repeats", "filter_list", "metric_list", "process_results")]
    return [digest([_named(settings), [instance.doc for instance in task.instances]])]


def _named(value: Any) -> Any:  # noqa: ANN401 - a setting of a task file can be anything
    """A setting with the names of functions in their place, whose addresses are new in every process."""
    match value:
        case dict():
            return {key: _named(one) for key, one in value.items()}
        case list() | tuple():
            return [_named(one) for one in value]
    return value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars of lm-eval, which has no switch for all of them, and what it and transformers print."""
    from tqdm import tqdm  # noqa: PLC0415 - comes with lm-eval

    make, verbosity = tqdm.__init__, transformers_logging.get_verbosity()

    def hidden(bar: tqdm, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - tqdm's own
        make(bar, *arguments, **settings | {"disable": True})

    tqdm.__init__ = hidden
    tqdm.set_lock(threading.RLock())  # else a semaphore of the system, which a killed worker leaves there
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = make
        transformers_logging.set_verbosity(verbosity)
