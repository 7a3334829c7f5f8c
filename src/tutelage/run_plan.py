"""Plan a run before it starts: memory by part on each device, time, disk, what to turn if it does not fit.

Everything is computed by formula from the config (`models/memory.py`, `models/flops.py`); no weight is
allocated and no device needs to be there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.base import whole_batches
from tutelage.config.runtime_config import uneven
from tutelage.config.teacher_config import (
    CacheTeacher,
    ControlTeacher,
    HiddenFormat,
    MeanTeacher,
    MinVarianceFormat,
    ModelTeacher,
    MultinomialFormat,
    RunTeacher,
    TopKFormat,
    single_teachers,
)
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models.devices import Hardware
from tutelage.models.directory import hub_config, is_local, read_config
from tutelage.models.flops import forward_flops, is_shape_of, parameters, training_flops
from tutelage.models.memory import Footprint, plan_memory
from tutelage.models.memory_remedies import least_memory, remedies
from tutelage.models.shapes import find_shape, read_shape
from tutelage.run_directory import RunDirectory, named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.config.teacher_config import TeacherConfig
    from tutelage.models.memory import MemoryPlan
    from tutelage.models.memory_remedies import Remedy
    from tutelage.models.shapes import ModelShape

_GB = 1e9
_WEIGHT_BYTES, _CHECKPOINT_BYTES = {"float32": 4, "bfloat16": 2}, 12
"""On disk, of a weight in the exported model; of a weight with its two moments in a checkpoint."""
_MASKED = (None, "sdpa", "eager")
"""Kinds of attention that are given a mask to keep documents apart."""
_WORTH = 0.98
"""Part of its memory that a run must at most take on twice as many devices for them to be worth it."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run takes.

    Attributes:
        hardware: on which.
        memory: bytes on each device, by part.
        least: bytes on each device that no setting of this mesh goes below.
        remedies: changes that lower them, in the order in which to try them; each on its own, then all.
        steps: optimizer steps.
        tokens: trained.
        flops: per token, of the student and of teachers that run beside it, a mean over the run's steps.
        checkpoint_bytes: on disk, of all checkpoints that are kept and the one that is being written.
        model_bytes: on disk, of the exported model.
    """

    hardware: Hardware
    memory: MemoryPlan
    least: float
    remedies: list[Remedy]
    steps: int
    tokens: int
    flops: tuple[float, float]
    checkpoint_bytes: float
    model_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the memory of a device is enough, by the formula."""
        return self.memory.total <= self.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, at the usual part of their peak."""
        device = self.hardware.device
        return self.hardware.devices * device.peak_flops * device.mfu / sum(self.flops)

    @property
    def seconds(self) -> float:
        """Of training; start-up, scoring and checkpoints are not counted."""
        return self.tokens / self.tokens_per_second

    def memory_lines(self, *, remedies: bool) -> list[str]:
        """The table of memory on each device, and what to turn for less."""
        hardware, total = self.hardware, self.memory.total
        lines = [f"{name:<18}{size / _GB:>9.2f} GB" for name, size in self.memory.parts.items()]
        verdict = "fits" if self.fits else f"{(total - hardware.memory) / _GB:.2f} GB too much"
        lines.append(
            f"{'each device':<18}{total / _GB:>9.2f} GB of {hardware.memory / _GB:.2f} GB ({hardware.name}): "
            f"{verdict}; most during the {self.memory.moment}"
        )
        if remedies:
            lines += [f"turn: {one.setting:<52}{one.bytes / _GB:>9.2f} GB" for one in self.remedies]
        return lines


def plan_run(config: RunConfig, hardware: Hardware) -> RunPlan:
    """Plan a run on given devices.

    Raises:
        UserError: the sizes of its models or of its vocabulary are not known here, or the processes do not
            fit the mesh that it asks for, or cannot share a step evenly.
    """
    config = named(config, planning=True)
    shape = _student_shape(config)
    vocab_size = _vocabulary(config, shape)
    teachers = _teacher_shapes(config)
    needs = footprint(config, shape, teachers, vocab_size, hardware)
    weights = parameters(shape, vocab_size).total
    try:
        steps = config.steps(weights)
    except ValueError as error:
        raise UserError(f"run {config.name}: parallel: {error}") from None
    length = config.data.sequence_length
    if (reason := uneven(config.global_batch_tokens // length, hardware.devices)) is not None:
        raise UserError(f"run {config.name}: {reason}")
    return RunPlan(
        hardware=hardware,
        memory=plan_memory(needs),
        remedies=list(remedies(needs, length, hardware.memory, more_devices=not hardware.shared)),
        least=least_memory(needs),
        steps=steps,
        tokens=steps * config.global_batch_tokens,
        flops=(
            training_flops(forward_flops(shape, vocab_size, length)),
            sum(forward_flops(teacher, vocab_size, length) for teacher in teachers)
            * config.objective.taught_share(
                steps, lr_vanishes=config.optim.vanishes(steps, config.global_batch_tokens)
            ),
        ),
        checkpoint_bytes=_CHECKPOINT_BYTES * weights * _checkpoints(config, steps),
        model_bytes=_WEIGHT_BYTES[config.export_dtype] * weights,
    )


def footprint(
    config: RunConfig,
    shape: ModelShape,
    teachers: Sequence[ModelShape],
    vocab_size: int,
    hardware: Hardware,
) -> Footprint:
    """What the memory of a run depends on.

    Args:
        config: the run.
        shape: of its student.
        teachers: shapes of those that run beside it.
        vocab_size: of the token store.
        hardware: where it is to run.

    Raises:
        UserError: the processes do not fit the mesh that the run asks for.
    """
    try:
        replicas, shards = config.parallel.mesh(hardware.devices)
    except ValueError as error:
        raise UserError(f"run {config.name}: parallel: {error}") from None
    share = max(config.data.sequence_length, config.global_batch_tokens // hardware.devices)
    micro = min(config.micro_batch_tokens or share, share)
    masked = config.data.document_mask and config.model.attn_implementation in _MASKED
    dense = bool(teachers) or any(isinstance(one, ControlTeacher) for one in single_teachers(config.teacher))
    target_bytes, target_width = _cached_targets(config.teacher)
    dense = dense or target_width > 0
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and hardware.cuda)
    live = [one for one in single_teachers(config.teacher) if isinstance(one, RunTeacher | ModelTeacher)]
    taught_half = all(half if one.dtype == "auto" else one.dtype == "bfloat16" for one in live)
    return Footprint(
        shape=shape,
        vocab_size=vocab_size,
        micro_batch=micro,
        micro_batches=max(1, share // micro),
        chunk=config.objective.tokens_per_chunk(vocab_size, hardware.kind, dense=dense),
        half=half,
        replicate=replicas,
        shards=shards,
        reshard=config.parallel.reshard_after_forward,
        recomputation=config.runtime.activation_checkpointing,
        compiled=config.runtime.compiles(hardware.kind),
        mask_length=config.data.sequence_length if masked else 0,
        teachers=tuple(teachers),
        teacher_bytes=2 if taught_half else 4,
        teacher_shards=shards if live and all(one.placement == "shard" for one in live) else 1,
        teacher_reshards=all(one.reshard_after_forward for one in live),
        dense=dense,
        target_bytes=target_bytes,
        target_width=target_width,
        cuda=hardware.cuda,
    )


def check_fits(config: RunConfig, kind: str, processes: int, together: int) -> str | None:
    """Refuse a run that cannot fit into the memory that is free now, before anything of it is there.

    Only what no setting of its mesh could make fit is refused; what the formula puts above the free memory
    may fit, because compiled code keeps less.

    Args:
        config: the run.
        kind: type of the device, as torch names it.
        processes: of the run.
        together: how many of them are on this machine.

    Returns:
        A warning if the run may not fit, else None.

    Raises:
        UserError: it cannot fit; the message has the table and what to turn.
    """
    try:
        plan = plan_run(config, Hardware.here(kind, processes, together))
    except UserError:  # of a model of another family; what is wrong is said when the run is opened
        return None
    if plan.fits:
        return None
    return _explain(config, plan, refuse=plan.least > plan.hardware.memory)


def out_of_memory(config: RunConfig, kind: str, processes: int, together: int) -> list[str]:
    """What to tell the user of a run that has run out of memory: the plan's table and what to turn.

    Args:
        config: the run.
        kind: type of the device, as torch names it.
        processes: of the run.
        together: how many of them are on this machine.
    """
    try:
        plan = plan_run(config, Hardware.here(kind, processes, together, free=False))
    except UserError as error:  # of a model of another family
        return [f"turn: a smaller micro_batch_tokens; there is no plan of this run ({error})"]
    return plan.memory_lines(remedies=True)


def _explain(config: RunConfig, plan: RunPlan, *, refuse: bool) -> str:
    total, memory = plan.memory.total / _GB, plan.hardware.memory / _GB
    lines = plan.memory_lines(remedies=True)
    if refuse:
        first = f"run {config.name}: it needs {total:.2f} GB on each device, and {memory:.2f} GB are free"
        raise UserError("\n".join([first, *lines]))
    first = f"run {config.name}: it may need {total:.2f} GB on each device, and {memory:.2f} GB are free"
    return "\n".join([first, *lines])


def fewest_devices(
    config: RunConfig, shape: ModelShape, teachers: Sequence[ModelShape], vocab_size: int, device: str
) -> tuple[int, MemoryPlan]:
    """How many devices of a kind a run takes, and its memory on each.

    That is `parallel.processes` if it fits on so many; else, if `shard` is auto, twice as many until it fits
    or dividing it further does not help.

    Args:
        config: the run.
        shape: of its student.
        teachers: shapes of those that run beside it.
        vocab_size: of the token store.
        device: name of the kind.
    """

    def memory(devices: int) -> MemoryPlan:
        hardware = Hardware.named(device, devices)
        return plan_memory(footprint(config, shape, teachers, vocab_size, hardware))

    limit, parallel = Hardware.named(device, 1).memory, config.parallel
    sequences, devices = config.global_batch_tokens // config.data.sequence_length, parallel.processes
    found = devices, memory(devices)
    if parallel.shard != "auto":
        return found
    while found[1].total > limit and sequences % (2 * devices) == 0:
        devices *= 2
        more = memory(devices)
        if more.total > _WORTH * found[1].total:
            break
        found = devices, more
    return found


def _student_shape(config: RunConfig) -> ModelShape:
    if config.model.shape is not None:
        return find_shape(config.model.shape)
    if config.model.path is not None:
        return _shape_at(config.model.path, config.model.revision, "model.path")
    return _shape_of_run(config, str(config.model.run), "model.run")


def _teacher_shapes(config: RunConfig) -> list[ModelShape]:
    """Shapes of the teachers that run beside the student; none where targets are kept."""
    if isinstance(config.teacher, MeanTeacher) and config.teacher.cache is not None:
        return []
    found = []
    for teacher in single_teachers(config.teacher):
        if isinstance(teacher, RunTeacher) and teacher.cache is None:
            found.append(_shape_of_run(config, teacher.run, "teacher.run"))
        elif isinstance(teacher, ModelTeacher) and teacher.cache is None:
            found.append(_shape_at(teacher.path, teacher.revision, "teacher.path"))
    return found


def _shape_of_run(config: RunConfig, run: str, field: str) -> ModelShape:
    """Shape of another run in the same output directory, which may still be in training."""
    directory = RunDirectory(config.output / run)
    if directory.model.is_dir():
        return _shape_at(str(directory.model), None, field)
    return _student_shape(directory.config())


def _shape_at(path: str, revision: str | None, field: str) -> ModelShape:
    from tutelage.models.hub import outline  # noqa: PLC0415 - loads torch, which shapes do without

    settings = read_config(Path(path)) if is_local(path) else hub_config(path, revision)
    shape = read_shape(settings, path)
    if shape is None or not is_shape_of(shape, outline(path, settings)):
        raise UserError(
            f"{field} = {path}: the plan knows the sizes of attention with rotary positions and a gated MLP "
            f"(Llama, Qwen, Mistral, ...), not of model_type {settings.get('model_type')}; such a run can be "
            "started without a plan"
        )
    return shape


def _vocabulary(config: RunConfig, shape: ModelShape) -> int:
    """Entries of the token store's vocabulary; of the paper's where there is no store yet."""
    if shape.vocab_size is not None and not (config.data.store / "manifest.json").is_file():
        return shape.vocab_size
    return open_store(config.data.store).vocab_size


def _cached_targets(teacher: TeacherConfig | None) -> tuple[float, int]:
    """(bytes per token of targets that are read from disk, width of their hidden states or 0)."""
    if isinstance(teacher, CacheTeacher):
        from tutelage.teachers.cache.layout import read_cache_manifest  # noqa: PLC0415 - loads torch

        manifest = read_cache_manifest(teacher.path)
        kept, width = manifest.format, manifest.width
    elif isinstance(teacher, RunTeacher | ModelTeacher | MeanTeacher) and teacher.cache is not None:
        kept, width = teacher.cache.format, 0
    else:
        return 0.0, 0
    if isinstance(kept, HiddenFormat):
        return 4.0 * width, width
    return _entry_bytes(kept), 0


def _entry_bytes(kept: TopKFormat | MinVarianceFormat | MultinomialFormat) -> float:
    """Bytes of a token's targets: an int64 id and a float32 weight for each entry, and two numbers more."""
    if isinstance(kept, TopKFormat):
        return 12.0 * kept.k + 8
    return 12.0 * (kept.ids if isinstance(kept, MinVarianceFormat) else kept.draws) + 8


def _checkpoints(config: RunConfig, steps: int) -> int:
    """Checkpoints that are on disk at once, at most, with the one that is being written."""
    batch, kept = config.global_batch_tokens, config.checkpoint
    written = math.ceil(steps / whole_batches(kept.every, batch))  # the last step has one in any case
    for_good = 0 if kept.keep_every is None else steps // whole_batches(kept.keep_every, batch)
    return min(kept.keep + 1, written) + for_good + kept.keep_before_decay
