"""Estimate what studies take on a given machine, before anything runs (`tutelage study plan`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tutelage.config.base import parse_tokens, tokens_text
from tutelage.config.load import digest
from tutelage.errors import UserError
from tutelage.models.devices import Hardware, find_device
from tutelage.models.flops import forward_flops
from tutelage.models.shapes import find_shape
from tutelage.run_plan import fewest_devices
from tutelage.study.cache_cost import CacheCosts
from tutelage.study.cells import beside
from tutelage.study.given_models import teacher_shape
from tutelage.study.nodes import Cost, check_cells, scored_tokens
from tutelage.study.plan import load_plan
from tutelage.study.timings import Speeds, critical_path, makespan, read_timings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tutelage.config.run_config import RunConfig
    from tutelage.config.study_config import StudyConfig, TeacherSpec
    from tutelage.models.devices import Device
    from tutelage.models.shapes import ModelShape
    from tutelage.study.cache_cost import Caches
    from tutelage.study.cells import Cell
    from tutelage.study.expand import ExpandedStudy

    Speed = Callable[[str, str | None], float]
    """FLOPs per second of a run, by the names of its shape and of the teacher that runs beside it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One run of some studies that share runs.

    Attributes:
        key: its name, and what tells it from a cell of another study that has the same name.
        needs: keys of what comes first.
        cell: what it stands for.
        cost: what is still to be computed, without the steps of another run that it starts from.
        scoring_flops: of scoring it when it is trained, at most.
        beside: shape of the teacher that runs beside it; "cached" or "control" if it computes nothing.
        processes: devices that it takes at a time.
        memory: peak bytes on each of them.
        cache_flops: of its teacher's forward passes over the training text, if it is the first to read them
            from a cache, and so makes that.
    """

    key: str
    needs: tuple[str, ...]
    cell: Cell
    cost: Cost
    scoring_flops: float
    beside: str | None
    processes: int
    memory: float
    cache_flops: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of training, its teacher, live or for a cache, and scoring."""
        return self.cost.total + self.cache_flops + self.scoring_flops


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds that runs take.

    Attributes:
        wall: until the last run is done.
        device: of all devices' work.
        path: keys of the critical path.
        path_seconds: of the critical path, on any number of devices.
    """

    wall: float
    device: float
    path: list[str]
    path_seconds: float


def works_of(
    studies: Sequence[ExpandedStudy], device: str = "h100", texts: Sequence[int | None] = ()
) -> tuple[list[Work], Caches, list[str]]:
    """Every run of `studies` once, each after what it needs; their caches; what the estimate leaves out.

    Args:
        studies: what is to be run.
        device: name of the kind of device, whose memory says over how many a run is divided.
        texts: tokens of each study's training text, None where it is not built; default: of none.

    Raises:
        UserError: a cell cannot be built; the message names it.
    """
    works: dict[str, Work] = {}
    caches = CacheCosts()
    notes: list[str] = []
    for expanded, text in zip_longest(studies, texts):
        name = expanded.study.name
        found = _Reader(expanded, device, caches, text)
        for cell in expanded.cells:
            work = found.work(cell)
            works.setdefault(work.key, work)
        notes += [f"{name}: {text}" for text in dict.fromkeys(found.rounded)]
        notes += [f"{name}: {text}" for text in dict.fromkeys(found.left_out)]
        if (tasks := expanded.study.tasks) is not None:
            notes.append(f"{name}: asking its runs {', '.join(tasks.names)} is not counted")
    for key, flops in caches.made_by().items():
        works[key] = replace(works[key], cache_flops=flops)
    return list(works.values()), caches.total, notes


def duration(works: Sequence[Work], devices: int, speed: Speed) -> Duration:
    """How long `works` take on `devices`, or on as many as the widest run takes if these are more.

    Args:
        works: the runs, each after what it needs.
        devices: how many work at the same time.
        speed: of each run on one device; several are taken to be as many times as fast.
    """
    widths = {work.key: work.processes for work in works}
    seconds = {work.key: _seconds(work, speed) for work in works}
    needs = {work.key: work.needs for work in works}
    path = critical_path(seconds, needs)
    return Duration(
        wall=makespan(seconds, needs, max([devices, *widths.values()]), widths),
        device=sum(widths[key] * spent for key, spent in seconds.items()),
        path=path,
        path_seconds=sum(seconds[key] for key in path),
    )


def _seconds(work: Work, speed: Speed) -> float:
    """How long a run takes on its devices."""
    taught = work.cell.teacher if work.cell.kind == "student" else None
    return work.flops / speed(work.cell.shape, taught) / work.processes


def _sizes(works: Sequence[Work], speed: Speed) -> list[dict[str, Any]]:
    """Runs alike in shape, teacher, devices and memory: how many, on what, and hours of the longest."""
    groups: dict[tuple[str, str | None, int, float], list[Work]] = {}
    for work in works:
        taught = work.beside if work.cell.kind == "student" else None
        groups.setdefault((work.cell.shape, taught, work.processes, work.memory), []).append(work)
    return [
        {
            "shape": shape,
            "teacher": taught,
            "runs": len(group),
            "devices": devices,
            "bytes": memory,
            "hours": max(_seconds(work, speed) for work in group) / 3600,
        }
        for (shape, taught, devices, memory), group in groups.items()
    ]


def by_kind(works: Sequence[Work]) -> dict[str, tuple[int, int]]:
    """Runs and training tokens of each kind of run."""
    runs: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for work in works:
        runs[work.cell.kind] += 1
        tokens[work.cell.kind] += work.cost.tokens
    return {kind: (runs[kind], tokens[kind]) for kind in runs}


def by_purpose(works: Sequence[Work], caches: Caches) -> dict[str, float]:
    """FLOPs of training teachers, training students, running teachers beside them, and scoring."""
    return {
        "teacher training": sum(work.cost.flops for work in works if work.cell.kind == "teacher"),
        "student training": sum(work.cost.flops for work in works if work.cell.kind != "teacher"),
        "teacher forward": sum(work.cost.teacher_flops for work in works) + caches.flops,
        "scoring (at most)": sum(work.scoring_flops for work in works),
    }


class _Reader:
    """Costs of the cells of one study."""

    def __init__(self, expanded: ExpandedStudy, device: str, caches: CacheCosts, text: int | None) -> None:
        self._device, self._caches, self._text = device, caches, text
        self.study, self.teachers = expanded.study, expanded.teachers
        self._drafts = check_cells(expanded)
        self._vocab_size = _vocab_size(expanded.study)
        self._keys: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self.rounded: list[str] = []
        self.left_out: list[str] = []

    def work(self, cell: Cell) -> Work:
        """The cost of a cell whose needs are known."""
        config = self._drafts[cell.name]
        try:
            shape = find_shape(cell.shape)
            vocab_size = self._vocabulary(shape)
            cost = Cost.of(cell, config, self.teachers, vocab_size)
        except UserError as error:
            raise UserError(f"study {self.study.name}: {cell.name}: {error}") from None
        needs = tuple(self._keys[name] for name in cell.needs)
        taught = None if cell.teacher is None else self.teachers[cell.teacher]
        parts = beside(cell, self.teachers) if cell.kind == "student" else []
        dumped = [spec.model_dump(mode="json") for spec in ([taught] if taught else []) + parts]
        recipe = [cell.settings, dumped, needs]
        key = self._keys[cell.name] = f"{cell.name}-{digest(recipe)}"
        self._tokens[cell.name] = cost.tokens
        if cell.compute_of is None and parse_tokens(cell.tokens, cost.parameters) != cost.tokens:
            batch, asked = config.global_batch_tokens, tokens_text(cell.tokens)
            self.rounded.append(
                f"of {asked} tokens {cost.tokens:,} are trained, in whole batches of {batch:,}"
            )
        teacher = taught if cell.kind == "student" else None
        if cached := teacher is not None and teacher.cache is not None:
            self._read_cache(key, cell, needs, cost.tokens, vocab_size)
        taught_by = [] if cell.compute_of is not None else parts
        found = [teacher_shape(spec, config.data.sequence_length) for spec in taught_by]
        self.left_out += [text for _, left_out in found for text in left_out]
        shapes = [one for one, _ in found if one is not None]
        live, kept = ([], shapes) if cached else (shapes, [])
        processes, memory = fewest_devices(config, shape, live, kept, vocab_size, self._device)
        scored = scored_tokens(config, cost.tokens)
        return Work(
            key=key,
            needs=needs,
            cell=cell,
            cost=replace(cost, flops=cost.flops * (1 - self._shared(cell, config) / cost.tokens)),
            scoring_flops=forward_flops(shape, vocab_size, config.data.sequence_length) * scored,
            beside=None if teacher is None else "cached" if cached else _shapes(parts),
            processes=processes,
            memory=memory.total,
        )

    def _read_cache(self, key: str, cell: Cell, needs: Sequence[str], tokens: int, vocab_size: int) -> None:
        """Note the cache that a run reads, and say for how much text it is counted."""
        name, length = str(cell.teacher), self._drafts[cell.name].data.sequence_length
        self._caches.add(
            key,
            [needs, self.study.corpus.model_dump(mode="json")],
            self.teachers[name],
            beside(cell, self.teachers),
            tokens=self._text or tokens,
            length=length,
            vocab_size=vocab_size,
        )
        if self._text is None:
            self.left_out.append(
                f"a cache covers the whole training text; that of {name} is counted for its longest student, "
                "as the text is not built yet"
            )

    def _shared(self, cell: Cell, config: RunConfig) -> float:
        """Tokens that a run does not train because it starts where a shorter run begins to decay."""
        return 0.0 if cell.branch_from is None else self._tokens[cell.branch_from] * (1 - config.optim.decay)

    def _vocabulary(self, shape: ModelShape) -> int:
        """Entries of the tokenizer, or of the paper's where it is not here."""
        found = self._vocab_size or shape.vocab_size
        if found is None:
            raise UserError(
                f"{self.study.corpus.tokenizer.path} is not here, so the vocabulary of {shape.name} is not "
                "known; give corpus.tokenizer.path a tokenizer.json or its directory"
            )
        return found


def _shapes(teachers: Sequence[TeacherSpec]) -> str:
    """What computes a student's targets: shapes, given models, or nothing that takes time."""
    real = [str(teacher.shape or teacher.model) for teacher in teachers if teacher.control is None]
    return " + ".join(real) or "control"


def _vocab_size(study: StudyConfig) -> int | None:
    """Entries of the tokenizer; None if it is a ready one that is not on this machine."""
    tokenizer = study.corpus.tokenizer
    if tokenizer.path is None:
        return tokenizer.vocab_size
    if not tokenizer.path.exists():
        return None
    from tutelage.data.tokenizer import load_tokenizer  # noqa: PLC0415 - only where it is asked for

    return load_tokenizer(tokenizer.path).vocab_size


_WATTS_HOUR = 3.6e6


@dataclass(frozen=True, slots=True)
class Machine:
    """What a person says of the hardware.

    Attributes:
        device: name of the kind of device.
        devices: how many.
        mfu: part of the device's peak that is reached; None: the usual one.
        price: of a device for an hour.
    """

    device: str
    devices: int
    mfu: float | None
    price: float | None


def forecast(
    studies: Sequence[ExpandedStudy],
    machine: Machine,
    directory: Path | None,
    texts: Sequence[int | None] = (),
) -> dict[str, Any]:
    """What `studies` take, as JSON data.

    Args:
        studies: what is to be run; runs they share count once.
        machine: where.
        directory: of a study whose finished runs say how fast a device is; None: by the data sheet.
        texts: tokens of each study's training text, None where it is not built; default: of none.

    Raises:
        UserError: a cell cannot be built, or a device is unknown.
    """
    works, caches, notes = works_of(studies, machine.device, texts)
    if not works:
        raise UserError(f"study {studies[0].study.name}: no runs; give students, or teachers to train")
    speed, words, device = _speed(machine, directory)
    took = duration(works, machine.devices, speed)
    most = max(works, key=lambda work: work.memory)
    kinds = by_kind(works)
    names = {work.key: work.cell.name for work in works}
    return {
        "runs": {kind: {"runs": runs, "tokens": tokens} for kind, (runs, tokens) in kinds.items()},
        "total_runs": len(works),
        "total_tokens": sum(work.cost.tokens for work in works),
        "flops": by_purpose(works, caches),
        "memory": {
            "bytes": most.memory,
            "run": most.cell.name,
            "fits": most.memory <= Hardware.named(machine.device, 1).memory,
            "devices": max(work.processes for work in works),
        },
        "sizes": _sizes(works, speed),
        "cache_bytes": caches.bytes,
        "source": words,
        "time": {"wall_seconds": took.wall, "device_seconds": took.device},
        "critical_path": {"seconds": took.path_seconds, "runs": [names[key] for key in took.path]},
        "energy_kwh": device.watts * took.device / _WATTS_HOUR,
        "price": machine.price,
        "cost": None if machine.price is None else machine.price * took.device / 3600,
        "notes": notes,
    }


def _speed(machine: Machine, directory: Path | None) -> tuple[Speed, str, Device]:
    """The speed of a run, its source in words, and the device."""
    device = find_device(machine.device)
    timings = [] if directory is None else read_timings(directory, load_plan(directory))
    if timings:
        speeds = Speeds(timings)

        def measured(shape: str, teacher: str | None) -> float:
            speed = speeds.of(shape, teacher)
            assert speed is not None  # noqa: S101 - some run is finished
            return speed

        words = f"{machine.devices} x what {len(timings)} finished runs of {directory} were trained on"
        return measured, words, device
    mfu = machine.mfu or device.mfu
    peak = f"{device.peak_flops / 1e12:g} TFLOP/s"
    words = f"{machine.devices} x {machine.device} ({device.summary}) at {mfu:.0%} of {peak}"
    return lambda *_: device.peak_flops * mfu, words, device
