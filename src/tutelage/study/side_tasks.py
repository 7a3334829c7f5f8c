"""Do what a study has to do beside its runs, on its engine: build token stores, ask runs their tasks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.checksums import file_sum
from tutelage.config.load import digest
from tutelage.data.store import open_store
from tutelage.data.store_manifest import remarks
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.stopping import stop_signal
from tutelage.study.engines import AskTask, StoreTask
from tutelage.study.engines.local import study_device
from tutelage.study.nodes import Stores
from tutelage.study.texts import check_corpora, other_texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.config.data_config import StoreConfig
    from tutelage.config.study_config import StudyConfig
    from tutelage.progress import Progress
    from tutelage.study.engines import Engine, TaskOutcome
    from tutelage.study.expand import ExpandedStudy
    from tutelage.study.leases import Leases, LeaseState
    from tutelage.study.nodes import Node

_POLL_SECONDS = 0.5
_BUSY_SECONDS = 5.0
_GRACE_SECONDS = 60.0
_CHECK = "tasks"
"""The lease on the check of tasks; no run's id is so."""


def build_stores(
    expanded: ExpandedStudy, directory: Path, engine: Engine, leases: Leases, progress: Progress
) -> Stores:
    """Build a study's token stores in `directory`: the corpus, then the rest in its tokens.

    Raises:
        UserError: a store cannot be built.
        Stopped: on Ctrl-C or `tutelage study stop`.
    """

    def build(configs: Mapping[str, StoreConfig]) -> dict[str, Path]:
        tasks = {key: StoreTask(config=config, directory=directory) for key, config in configs.items()}
        return _build_all(tasks, engine, leases, progress)

    if not any(directory.glob("*/manifest.json")):  # a store that is built needs its package no more
        check_corpora(expanded)
    corpus = build({"corpus": expanded.study.corpus})["corpus"]
    wanted = other_texts(expanded, corpus)
    distinct = {config.model_dump_json(): config for config in wanted.values()}
    built = build(distinct)
    places = {key: built[config.model_dump_json()] for key, config in wanted.items()}

    def of(part: str) -> dict[str, Path]:
        return {name: path for (kind, name), path in places.items() if kind == part}

    return Stores(corpus=corpus, domains=of("domain"), teachers=of("teacher"), stages=of("stage"))


def _build_all(
    tasks: Mapping[str, StoreTask], engine: Engine, leases: Leases, progress: Progress
) -> dict[str, Path]:
    """Build every store, until one fails."""
    waiting, running, built = list(tasks), set[str](), dict[str, Path]()
    with stop_signal() as stop:
        while waiting or running:
            for key in waiting[: engine.slots - len(running)]:
                waiting.remove(key)
                running.add(key)
                progress.note(f"text: {tasks[key].config.name}")
                engine.start(key, tasks[key])
            for key, outcome in engine.wait(_POLL_SECONDS).items():
                running.remove(key)
                if outcome.status in {"failed", "disk", "lost"}:
                    raise UserError(outcome.text)
                if outcome.status == "done":
                    built[key] = Path(outcome.text)
                    for line in remarks(open_store(built[key]).manifest):
                        progress.note(f"text: {tasks[key].config.name}: {line}")
                else:  # another process is building it
                    waiting.append(key)
                    stop.wait(_POLL_SECONDS)
            if stop.is_set() or leases.is_asked_to_stop():
                raise Stopped
    return built


@dataclass(frozen=True)
class Asker:
    """Asks the runs of a study its downstream tasks, shared with other runners by leases as the runs are.

    Attributes:
        study: whose `tasks` are asked; none, and nothing is done.
        directory: of the study.
        engine: asks, several runs at a time.
        leases: of this runner; a run's questions have one of their own.
        progress: is told how many runs have been asked.
    """

    study: StudyConfig
    directory: Path
    engine: Engine
    leases: Leases
    progress: Progress

    def check(self) -> None:
        """Check, before anything is built, that the tasks can be asked, unless they were checked before.

        Raises:
            UserError: they cannot.
            Stopped: on Ctrl-C or `tutelage study stop`.
        """
        self.leases.refresh()
        if self.study.tasks is None or self.leases.state(_CHECK, self._what) == "done":
            return
        while (outcome := self._checked()).status != "done":
            if (error := _error(outcome, f"study {self.study.name}: tasks")) is not None:
                raise error
        if self.leases.acquire(_CHECK, self._what):
            self.leases.release(_CHECK, done=True)

    def _checked(self) -> TaskOutcome:
        """The outcome of the check."""
        self.engine.start(_CHECK, self._task())
        with stop_signal() as stop:
            ended: dict[str, TaskOutcome] = {}
            while not ended:
                ended = self.engine.wait(_POLL_SECONDS)
                if stop.is_set() or self.leases.is_asked_to_stop():
                    raise Stopped
        return ended[_CHECK]

    def ask(self, nodes: Sequence[Node], corpus: Path) -> None:
        """Ask every run that has weights and has not been asked yet, here or by other runners.

        Args:
            nodes: the runs, all finished.
            corpus: the study's text, which stages and some teachers were not trained on.

        Raises:
            UserError: a run could not be asked; the answers of others are kept.
            Stopped: on Ctrl-C or `tutelage study stop`; the same call goes on.
        """
        every, nodes = len(nodes), [node for node in nodes if not node.directory.lacks_weights()]
        left = [] if self.study.tasks is None else self._left(nodes)
        if not left:
            return
        if copies := every - len(nodes):
            self.progress.note(f"not asked: {copies} runs of which only results are here, without weights")
        stage = f"questions to {len(nodes)} runs"
        self.progress.start(stage, len(nodes), "runs", done=len(nodes) - len(left))
        asked: dict[str, Node] = {}
        not_before: dict[str, float] = {}
        with stop_signal() as stop:
            while left:
                now = time.monotonic()
                self._start([node for node in left if not_before.get(_key(node), now) <= now], corpus, asked)
                errors = []
                for key, outcome in self.engine.wait(_POLL_SECONDS).items():
                    not_before[key] = time.monotonic() + _BUSY_SECONDS
                    node = asked.pop(key)
                    errors.append(self._settle(node, outcome))
                    if outcome.status == "done":  # whether or not a task of it gives scores
                        left = [one for one in left if one is not node]
                if any(errors) or stop.is_set() or self.leases.is_asked_to_stop():
                    self._stop(asked)
                    raise next(filter(None, errors), None) or Stopped
                left = self._left(left)
                self.progress.advance(stage, len(nodes) - len(left))
        self.progress.finish(stage)

    @cached_property
    def _what(self) -> str:
        """Identity of the tasks, the user's own task files included, wherever they lie."""
        tasks = self.study.tasks
        place = None if tasks is None else tasks.include
        files = sorted(path for path in ([] if place is None else place.rglob("*")) if path.is_file())
        content = [(str(path.relative_to(str(place))), file_sum(path)) for path in files]
        settings = None if tasks is None else tasks.model_dump(mode="json", exclude={"include"})
        return digest([settings, [(name, found.bytes, found.crc32) for name, found in content]])

    def _left(self, nodes: Sequence[Node]) -> list[Node]:
        """Runs that are to be asked; one that was trained anew since it was is among them."""
        self.leases.refresh()
        return [node for node in nodes if self._state(node) != "done" or not _has_answers(node)]

    def _state(self, node: Node) -> LeaseState:
        return self.leases.state(_key(node), digest([node.id, self._what]))

    def _start(self, nodes: Sequence[Node], corpus: Path, asked: dict[str, Node]) -> None:
        """Fill the engine with runs that nobody asks; they are added to `asked`."""
        for node in nodes:
            free = _key(node) not in asked and self._state(node) in {"free", "done"}
            if not free or len(asked) >= self.engine.slots:
                continue
            if self.leases.acquire(_key(node), digest([node.id, self._what])):
                asked[_key(node)] = node
                self.engine.start(_key(node), self._task(node.directory.path, corpus))

    def _task(self, run: Path | None = None, corpus: Path | None = None) -> AskTask:
        assert self.study.tasks is not None  # noqa: S101 - else nothing is left to ask
        stores, device = self.directory / "data", study_device(self.study)
        return AskTask(run=run, corpus=corpus, tasks=self.study.tasks, stores=stores, device=device)

    def _settle(self, node: Node, outcome: TaskOutcome) -> UserError | None:
        """End the lease, if nobody has taken it over; return what is wrong."""
        if self._state(node) == "ours":
            self.leases.release(_key(node), done=outcome.status == "done")
        return _error(outcome, f"{node.cell.name}: tasks")

    def _stop(self, asked: dict[str, Node]) -> None:
        """Cancel what runs, and wait until it has ended."""
        for key in asked:
            self.engine.cancel(key)
        deadline = time.monotonic() + _GRACE_SECONDS
        while asked and time.monotonic() < deadline:
            for key, outcome in self.engine.wait(_POLL_SECONDS).items():
                self._settle(asked.pop(key), outcome)


def _key(node: Node) -> str:
    """Name of the lease on a run's questions; no run's id ends so."""
    return f"{node.id}-tasks"


def _has_answers(node: Node) -> bool:
    """Whether there are scores of tasks at all."""
    scores = node.directory.scores
    return scores.is_file() and b'"downstream"' in scores.read_bytes()


def _error(outcome: TaskOutcome, what: str) -> UserError | None:
    """What is wrong, unless another process is at work or this one was stopped."""
    match outcome.status:
        case "disk":
            return DiskError(outcome.text)
        case "lost":
            return UserError(outcome.text)
        case "failed":
            remedy = "mend it or take it out of `tasks`; what is there is kept"
            return UserError(f"{what}: {outcome.text}\n{remedy}")
    return None
