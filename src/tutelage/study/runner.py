"""Run the runs of a study, each as soon as those it needs are finished, beside other runners."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tutelage.config.load import digest
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.files import size_text
from tutelage.models.devices import Hardware
from tutelage.run_directory import evaluation_id
from tutelage.run_plan import plan_together
from tutelage.stopping import stop_signal
from tutelage.study.engines import RunTask
from tutelage.study.reporter import StudyProgress, StudyReporter
from tutelage.study.timings import chain_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tutelage.progress import Progress
    from tutelage.study.engines import Engine, TaskOutcome
    from tutelage.study.leases import Failures, Leases
    from tutelage.study.nodes import Node

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0
_BUSY_SECONDS = 5.0


def run_all(
    nodes: Sequence[Node],
    engine: Engine,
    leases: Leases,
    failures: Failures,
    progress: Progress,
    cohort: int = 1,
) -> None:
    """Run `nodes` until each is finished or has failed for good, here or by another runner.

    Finished runs cost nothing, stopped and abandoned ones resume from their checkpoints, and a run that fails
    is tried again before it stops those that need it, and only those.

    Args:
        nodes: the runs; each comes after what it needs.
        engine: where they run, entered.
        leases: of this runner, entered.
        failures: of the study.
        progress: is told how all runs stand, twice a second.
        cohort: largest number of students of one teacher and seed that train together.

    Raises:
        UserError: some runs failed; the message lists them. What finished is kept. Or the study's directory
            has vanished, or the engine has no machines left.
        DiskError: no space is left; the running ones were stopped.
        Stopped: on Ctrl-C or `tutelage study stop`, after the running ones have written their checkpoints.
    """
    _check_sizes(nodes, engine)
    state = RunnerState(nodes, engine, leases, failures, cohort)
    reporter = StudyReporter(progress, nodes, engine.slots)
    with stop_signal() as stop:
        state.refresh()
        while not state.is_over():
            state.start_ready()
            while state.room.notes:
                progress.note(state.room.notes.pop(0))
            reporter.show(state.progress())
            outcomes = engine.wait(_POLL_SECONDS)
            leases.check_place()  # before anything is written, which would make a part of it anew
            state.settle(outcomes)
            if state.hindered or stop.is_set() or leases.is_asked_to_stop():
                state.stop()
                raise state.hindered or Stopped
            state.refresh()
    reporter.show(state.progress())
    if state.failed:
        lines = "\n".join(f"  {run}: {reason}" for run, reason in state.failed.items())
        finished = len(nodes) - len(state.failed)
        rest = f"; the other {finished} are finished and kept" if finished else ""
        raise UserError(
            f"{len(state.failed)} of {len(nodes)} runs failed{rest}\n{lines}\n"
            "mend what failed; the same command tries these runs again"
        )


def _check_sizes(nodes: Sequence[Node], engine: Engine) -> None:
    """Refuse runs that take more processes than the engine has devices for one run."""
    for node in nodes:
        if (processes := node.config.parallel.processes) > engine.largest:
            raise UserError(
                f"run {node.id}: parallel.processes = {processes}, but only {engine.largest} can have a "
                "device of their own here; give --workers one per device, or use a larger machine or cluster"
            )


@dataclass
class RunnerState:
    """What a runner knows of the runs between two readings of the disk."""

    nodes: Sequence[Node]
    engine: Engine
    leases: Leases
    failures: Failures
    cohort: int
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, list[Node]] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    hindered: UserError | None = None
    """What is wrong that is the fault of no run: none has failed, and all can go on when it is mended."""

    def __post_init__(self) -> None:
        self._recipes = {node.id: _recipe(node) for node in self.nodes}
        costs = {node.id: node.cost.total for node in self.nodes}
        self._weights = chain_weights(costs, {node.id: node.needs for node in self.nodes})
        self._keys = map(str, itertools.count())
        self.room = MemoryRoom(self.engine.free_memory)
        self._tried: set[str] = set()

    def refresh(self) -> None:
        """Read from disk what other runners have done; cancel runs that they took over."""
        self.leases.refresh()
        self._tried = self.failures.attempted()
        marked = self.failures.marked()
        failed: dict[str, str] = {}
        for node in self.nodes:
            if node.id in self.finished:
                continue
            if self._lease(node) == "done" and node.directory.is_done():
                self.finished.add(node.id)
            elif node.id in marked and node.id not in self._ours():
                failed[node.id] = marked[node.id]
            elif broken := [need for need in node.needs if need in failed]:
                failed[node.id] = f"needs {broken[0]}, which failed"
        self.failed = failed
        for key, members in self.tasks.items():
            if any(self._lease(node) != "ours" for node in members):
                self.engine.cancel(key)

    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        return not self.tasks and len(self.finished) + len(self.failed) == len(self.nodes)

    def start_ready(self) -> None:
        """Fill the engine with free runs, those on which the costliest chains of runs wait first.

        Of a study in replicates the first goes before the second, and so on, so that whenever it is stopped
        there are as many whole ones as the time allowed.

        One that takes several processes, or more memory than is left, waits until enough is free, and those
        behind it wait too: smaller ones would keep it waiting for ever.
        """
        now = time.monotonic()
        ready = [
            node
            for node in self.nodes
            if node.id not in self.finished
            and node.id not in self.failed
            and self.finished.issuperset(node.needs)
            and self.not_before.get(node.id, 0.0) <= now
            and self._is_free(node)
        ]
        ready.sort(key=lambda node: (node.replicate, -self._weights[node.id]))
        while ready and (free := self._free_slots() // ready[0].config.parallel.processes) > 0:
            together = self.room.fitting(self._together(ready, free))
            if not together:
                break
            ready = [node for node in ready if node not in together]
            taken = [node for node in together if self.leases.acquire(node.id, self._recipes[node.id])]
            if taken:
                key = next(self._keys)
                self.tasks[key] = taken
                configs, ids = zip(*((node.config, node.id) for node in taken), strict=True)
                self.room.take(key, taken)
                self.engine.start(key, RunTask(configs=configs, ids=ids))

    def settle(self, outcomes: Mapping[str, TaskOutcome]) -> None:
        """Record the outcomes of tasks that have ended and release their leases."""
        for key, outcome in outcomes.items():
            members = self.tasks.pop(key)
            self.room.give_back(key)
            for node in members:
                if self._lease(node) != "ours":  # taken over meanwhile: not ours to judge
                    # Where locks end at the machine it may have written over a finished run until now.
                    self.finished.discard(node.id)
                    continue
                if outcome.status == "done":
                    self.finished.add(node.id)
                elif outcome.status == "busy":
                    self.not_before[node.id] = time.monotonic() + _BUSY_SECONDS
                elif outcome.status in {"disk", "lost"}:
                    self.hindered = (DiskError if outcome.status == "disk" else UserError)(outcome.text)
                elif outcome.status == "failed" and not (len(members) > 1 and node.directory.is_done()):
                    own = node.directory.state().get("error") if len(members) > 1 else None
                    self.failures.add(node.id, own or outcome.text, _checkpoint(node), _shards(node))
                self.leases.release(node.id, done=outcome.status == "done")

    def stop(self) -> None:
        """Ask our tasks to stop and wait until they have."""
        for key in self.tasks:
            self.engine.cancel(key)
        deadline = time.monotonic() + _GRACE_SECONDS
        while self.tasks and time.monotonic() < deadline:
            self.settle(self.engine.wait(_POLL_SECONDS))

    def progress(self) -> StudyProgress:
        """How the runs stand."""
        left = [node for node in self.nodes if node.id not in self.finished]
        theirs = {node.id for node in left if self._lease(node) == "theirs"}
        ours = self._ours() - self.finished
        return StudyProgress(self.nodes, ours, theirs, set(self.finished), dict(self.failed))

    def _free_slots(self) -> int:
        """Processes that the engine has room for."""
        return self.engine.slots - sum(
            members[0].config.parallel.processes for members in self.tasks.values()
        )

    def _ours(self) -> set[str]:
        return {node.id for members in self.tasks.values() for node in members}

    def _is_free(self, node: Node) -> bool:
        """Whether nobody works on a run; one that was done and has vanished since is free again."""
        state = self._lease(node)
        return state == "free" or (state == "done" and not node.directory.is_done())

    def _lease(self, node: Node) -> str:
        return self.leases.state(node.id, self._recipes[node.id])

    def _together(self, ready: Sequence[Node], free: int) -> list[Node]:
        """The first ready run and those that can share its batches, as long as no slot stays empty.

        A run that failed before is tried alone, so that it cannot take others with it again.
        """
        first = ready[0]
        if first.cell.kind != "student" or first.id in self._tried:
            return [first]
        size = max(1, min(self.cohort, len(ready) // free))
        key = cohort_key(first)
        alike = [node for node in ready if node.id not in self._tried and cohort_key(node) == key]
        return alike[:size]


def cohort_key(node: Node) -> str:
    """A key that is equal for students that `check_cohort` lets train together."""
    config = node.config
    parts = (config.teacher, config.data, config.runtime, config.parallel)
    rest = [config.stage, config.global_batch_tokens, config.micro_batch_tokens, config.dtype]
    return f"{node.cell.kind} {parts} {rest}"


def _recipe(node: Node) -> str:
    """Identity of a finished run: how it was trained and on what it was scored."""
    return digest([node.id, evaluation_id(node.config)])


def _checkpoint(node: Node) -> int:
    """The step from which the run would resume."""
    return max(node.directory.saved(), default=0)


def _shards(node: Node) -> int:
    """Finished shards of the study's caches, if the run reads one: it may be the one that writes it."""
    caches = node.config.output.parent / "caches"
    return 0 if node.cache is None else sum(1 for _ in caches.glob("*/shards/*.bin"))


class MemoryRoom:
    """The memory that the tasks of a runner share.

    A task takes what it needs over seconds or minutes. So what tasks are planned to take is compared with
    what was free when none ran; and a new one with what is free now, since other programs take of it too.

    Args:
        free: gives the bytes that are free; endless where every task has memory of its own.

    Attributes:
        notes: what the user should know of runs that wait, once; whoever shows them empties the list.
    """

    def __init__(self, free: Callable[[], float]) -> None:
        self.notes: list[str] = []
        self._free = free
        self._all = 0.0
        self._taken: dict[str, float] = {}
        self._told: set[tuple[int, bool]] = set()
        self._known: dict[tuple[str, ...], float] = {}

    def fitting(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """The first of runs that are to train together, as many as fit; none if they have to wait.

        Where none runs, the first may: what cannot fit even alone is refused when it starts, with what to
        turn. Workers tell nobody what may not fit, so that is said here.
        """
        free = self._free()
        if not self._taken:
            self._all = free
        left = min(free, self._all - sum(self._taken.values()))
        fits = (count for count in range(len(nodes), 0, -1) if self._needed(nodes[:count]) <= left)
        count = next(fits, 0)
        if count < len(nodes):
            self._tell(nodes, count, max(0.0, left))
        return nodes[: max(count, 0 if self._taken else 1)]

    def take(self, key: str, nodes: Sequence[Node]) -> None:
        """Count what runs take once they start."""
        self._taken[key] = self._needed(nodes)

    def give_back(self, key: str) -> None:
        """Stop counting what runs took that have ended."""
        self._taken.pop(key, None)

    def _needed(self, nodes: Sequence[Node]) -> float:
        """As `needed`, computed once for those that are asked about twice a second while they wait."""
        key = tuple(node.id for node in nodes)
        if key not in self._known:
            self._known[key] = needed(nodes)
        return self._known[key]

    def _tell(self, nodes: Sequence[Node], count: int, left: float) -> None:
        name, needs = nodes[0].cell.name, size_text(self._needed(nodes[: max(1, count)]))
        if count:
            text = f"so {name} and {count - 1} more train together, not {len(nodes)}: they need {needs}"
        elif self._taken:
            text = f"so {name} waits until others have ended: it needs {needs}"
        else:
            text = f"and {name} may need {needs}, though nothing runs beside it"
        if (kind := (count, not self._taken)) not in self._told:
            self._told.add(kind)
            self.notes.append(f"memory: {size_text(left)} are left of {size_text(self._all)}, {text}")


_LIBRARIES = 0.3e9
"""Bytes that each of several processes takes for libraries; workers of one process share theirs."""


def needed(nodes: Sequence[Node]) -> float:
    """Bytes that runs need on this machine, trained together; 0 where the plan does not know their models."""
    configs = [node.config for node in nodes]
    processes = configs[0].parallel.processes
    try:
        plan = plan_together(configs, Hardware.here("cpu", processes, processes))
    except UserError:
        return 0.0
    return processes * (plan.memory.total + _LIBRARIES * (processes > 1))
