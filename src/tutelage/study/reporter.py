"""Report how the runs of a study stand, and about how long they still take, scoring included."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.teacher_config import MeanTeacher, ModelTeacher, RunTeacher, teacher_id
from tutelage.records import UnreadableError, read_sealed
from tutelage.study.timings import Speeds, Timing, makespan, part_done

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.progress import Progress
    from tutelage.study.nodes import Node


@dataclass(frozen=True, slots=True)
class StudyProgress:
    """The state of a study's runs, by run id.

    Attributes:
        nodes: all runs.
        running: runs that this runner works on.
        elsewhere: runs that other runners work on.
        finished: runs with nothing left to do.
        failed: runs that failed for good, with the reason.
    """

    nodes: Sequence[Node]
    running: set[str]
    elsewhere: set[str]
    finished: set[str]
    failed: Mapping[str, str]


class StudyReporter:
    """Report the state of runs to a `Progress`: a stage for all, and one for each that a runner works on.

    Args:
        progress: is told.
        nodes: all runs.
        slots: processes that this runner has at a time.
    """

    def __init__(self, progress: Progress, nodes: Sequence[Node], slots: int) -> None:
        self._progress = progress
        self._all = f"{len(nodes)} runs"
        self._total = sum(map(_work, nodes))
        self._clock = _Clock(slots)
        self._active: set[str] = set()
        self._ended: set[str] | None = None

    def show(self, standing: StudyProgress) -> None:
        """Report what has changed. Runs that were finished before the first call are only counted."""
        active = [node for node in standing.nodes if node.id in standing.running | standing.elsewhere]
        self._clock.look(standing, active)
        done = sum(_work(node) for node in standing.nodes if node.id in standing.finished)
        done += sum(self._clock.trained(node) for node in active)
        if self._ended is None:
            self._ended = set(standing.finished)
            if self._ended:
                self._progress.note(f"{len(self._ended)} of {self._all} are finished already")
            self._progress.start(self._all, self._total, done=done)
        counts = {"done": len(standing.finished), "failed": len(standing.failed), "running": len(active)}
        figures = {name: count for name, count in counts.items() if count}
        self._progress.describe(self._all, figures | {"seconds_left": self._clock.left(standing)})
        self._progress.advance(self._all, done)
        self._ended -= {node.id for node in active}
        ended = (standing.finished | standing.failed.keys()) - self._ended
        for node in (node for node in standing.nodes if node.id in ended):
            self._ended.add(node.id)
            if node.cell.name in self._active:
                self._active.remove(node.cell.name)
                self._progress.describe(node.cell.name, node.directory.last_metrics())
            word = "failed" if node.id in standing.failed else "done"
            self._progress.finish(node.cell.name, f"{word} ({len(self._ended)} of {self._all})")
        for name in self._active - {node.cell.name for node in active}:
            self._active.remove(name)
            self._progress.finish(name, "interrupted, to be resumed")
        for node in active:
            self._show_run(node, elsewhere=node.id in standing.elsewhere)

    def _show_run(self, node: Node, *, elsewhere: bool) -> None:
        name, done = node.cell.name, self._clock.trained(node) / _work(node)
        if name not in self._active:
            self._active.add(name)
            self._progress.start(name, 1.0, done=done)
        self._progress.advance(name, done)
        words = ["scoring"] * self._clock.is_scoring(node) + ["elsewhere"] * elsewhere
        where = {"where": ", ".join(words)} if words else {}
        row = node.directory.last_metrics()
        self._progress.describe(name, {**where, **row, "seconds_left": self._clock.left_of(node)})


class _Clock:
    """Estimates of the time that runs take, from what runs like them have taken in this study.

    Before a run has been finished, those that are under way have to do, and scoring is taken to be as fast as
    training. What cannot be told yet is nan.

    Args:
        slots: processes that this runner has at a time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._timings: dict[str, Timing] = {}
        self._scorings: dict[str, tuple[str, float]] = {}
        self._states: dict[str, dict[str, float]] = {}
        self._since: dict[str, float] = {}
        self._speeds = Speeds([])

    def look(self, standing: StudyProgress, active: Sequence[Node]) -> None:
        """Read the states of active runs, and once those of finished ones."""
        finished = [node for node in standing.nodes if node.id in standing.finished]
        for node in (node for node in finished if node.id not in self._scorings):
            state = node.directory.state()
            self._add_timing(node, state)
            self._scorings[node.id] = node.cell.shape, float(state.get("scoring_seconds", math.nan))
        self._states = {node.id: node.directory.state() for node in active}
        for node in active:
            self._add_timing(node, self._states[node.id])
            if self.is_scoring(node):
                self._since.setdefault(node.id, time.monotonic())
        self._speeds = Speeds([*self._timings.values()])

    def is_scoring(self, node: Node) -> bool:
        """Whether an active run has been trained."""
        state = self._states[node.id]
        return bool(state.get("steps")) and state.get("step", 0) >= state["steps"]

    def trained(self, node: Node) -> float:
        """FLOPs that an active run has behind it; scoring counts when it is over."""
        return node.cost.total * self._part(node)

    def left_of(self, node: Node) -> float:
        """Seconds that an active run still takes."""
        state, part = self._states[node.id], self._part(node)
        if part < 1:
            training = float(state.get("seconds", math.nan)) * (1 - part) / part if part else math.nan
            return training + self._scoring(node)
        left = self._scoring(node) - (time.monotonic() - self._since[node.id])
        return left if left > 0 else math.nan

    def left(self, standing: StudyProgress) -> float:
        """Seconds until all runs have ended, on the devices of all runners."""
        ended = standing.finished | standing.failed.keys()
        rest = [node for node in standing.nodes if node.id not in ended]
        costs = {node.id: self._seconds(node) for node in rest}
        for run, seconds in self._caching(standing, rest):
            costs[run] += seconds
        if any(math.isnan(cost) for cost in costs.values()):
            return math.nan
        needs = {node.id: [need for need in node.needs if need in costs] for node in rest}
        widths = {node.id: node.config.parallel.processes for node in rest}
        others = sum(widths[run] for run in standing.elsewhere if run in widths)
        return makespan(costs, needs, max(self._slots + others, *widths.values(), 1), widths)

    def _caching(self, standing: StudyProgress, rest: Sequence[Node]) -> Iterator[tuple[str, float]]:
        """Seconds that caches of targets still take, with the run that writes what is missing of each.

        That is the first of those that read it, as long as none of them has taken a step.
        """
        begun = {run for run, state in self._states.items() if state.get("step", 0)} | standing.finished
        written = {node.cache[0] for node in standing.nodes if node.cache is not None and node.id in begun}
        for node in rest:
            if node.cache is not None and node.cache[0] not in written:
                written.add(node.cache[0])
                speed = self._speeds.of(*_likeness(node))
                left = node.cache[1] * (1 - _written(node.config))
                yield node.id, math.nan if speed is None else left / speed

    def _seconds(self, node: Node) -> float:
        """Seconds of a device that a run still takes."""
        if node.id in self._states and self._part(node) == 1:
            return max(0.0, self._scoring(node) - (time.monotonic() - self._since[node.id]))
        part = self._part(node) if node.id in self._states else 0.0
        speed = self._speeds.of(*_likeness(node))
        training = math.nan if speed is None else node.cost.total * (1 - part) / speed
        return training + self._scoring(node)

    def _scoring(self, node: Node) -> float:
        """Seconds that scoring takes: as of runs of the same shape, of all runs, or by training's speed."""
        for shapes in ({node.cell.shape}, {shape for shape, _ in self._scorings.values()}):
            known = [
                seconds
                for shape, seconds in self._scorings.values()
                if shape in shapes and not math.isnan(seconds)
            ]
            if known:
                return statistics.median(known)
        speed = self._speeds.of(*_likeness(node))
        return math.nan if speed is None else node.scoring_flops / speed

    def _add_timing(self, node: Node, state: Mapping[str, float]) -> None:
        part, seconds = part_done(state), float(state.get("seconds", 0.0)) / max(1, state.get("cohort", 1))
        if part and seconds:
            self._timings[node.id] = Timing(*_likeness(node), node.cost.total * part, seconds)

    def _part(self, node: Node) -> float:
        return part_done(self._states[node.id])


def _written(config: RunConfig) -> float:
    """The fraction of the shards of the cache that a run keeps that is on disk.

    Its manifest is read as it lies: what reads it whole is in a room that loads torch; a runner does not.
    """
    teacher, data = config.teacher, config.data
    assert isinstance(teacher, RunTeacher | ModelTeacher | MeanTeacher)  # noqa: S101 - only these have one
    assert teacher.cache is not None  # noqa: S101 - as above
    kept = teacher.cache.model_dump(mode="json") | {"document_mask": data.document_mask}
    for file in (config.output.parent / "caches").glob("*/manifest.json"):
        with contextlib.suppress(UnreadableError, KeyError, TypeError):  # named when it is opened
            found = read_sealed(file)
            length, positions = found["layout"]["context_length"], found["layout"]["positions"]
            told = found["teacher"]["id"], length, {name: found[name] for name in kept}
            if told == (teacher_id(teacher), data.sequence_length, kept):
                shards: float = positions / length / found["layout"]["contexts_per_shard"]
                return min(1.0, sum(1 for _ in (file.parent / "shards").glob("*.bin")) / shards)
    return 0.0


def _work(node: Node) -> float:
    """FLOPs of a run, scoring included."""
    return node.cost.total + node.scoring_flops


def _likeness(node: Node) -> tuple[str, str | None]:
    """As `timings.likeness` has it of a run in a plan."""
    return node.cell.shape, node.cell.teacher if node.cell.kind == "student" else None
