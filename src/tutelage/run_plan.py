"""Plan a run before it starts: memory by part on each device, time, disk, what to turn if it does not fit.

Everything is computed by formula from the config (`models/memory.py`, `models/flops.py`); no weight is
allocated and no device needs to be there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tutelage.config.base import whole_batches
from tutelage.config.runtime_config import uneven
from tutelage.errors import UserError
from tutelage.models.devices import Hardware
from tutelage.models.flops import forward_flops, parameters, training_flops
from tutelage.models.memory import plan_memory
from tutelage.models.memory_remedies import least_memory, remedies
from tutelage.run_directory import named
from tutelage.run_footprint import footprint, student_shape, teacher_shapes, vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.models.forward_memory import MemoryPlan
    from tutelage.models.memory_remedies import Remedy
    from tutelage.models.shapes import ModelShape

_GB = 1e9
_WEIGHT_BYTES, _CHECKPOINT_BYTES = {"float32": 4, "bfloat16": 2}, 12
"""On disk, of a weight in the exported model; of a weight with its two moments in a checkpoint."""
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
        lines = self.memory.lines(self.hardware)
        if remedies:
            lines += [f"turn: {one.setting:<52}{one.bytes / _GB:>9.2f} GB" for one in self.remedies]
        return lines


def plan_run(config: RunConfig, hardware: Hardware, beside: Sequence[RunConfig] = ()) -> RunPlan:
    """Plan a run on given devices.

    Args:
        config: the run.
        hardware: the devices.
        beside: runs that train together with it, whose students are in memory too.

    Raises:
        UserError: the sizes of its models or of its vocabulary are not known here, or the processes do not
            fit the mesh that it asks for, or cannot share a step evenly.
    """
    config = named(config, planning=True)
    shape = student_shape(config)
    vocab_size = vocabulary(config, shape)
    live, cached = teacher_shapes(config)
    needs = footprint(config, shape, live, vocab_size, hardware, cached)
    shapes = [student_shape(named(one, planning=True)) for one in beside]
    needs = replace(needs, others=sum(parameters(one, vocab_size).total for one in shapes))
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
            sum(forward_flops(teacher, vocab_size, length) for teacher in live)
            * config.objective.taught_share(
                steps, lr_vanishes=config.optim.vanishes(steps, config.global_batch_tokens)
            ),
        ),
        checkpoint_bytes=_CHECKPOINT_BYTES * weights * _checkpoints(config, steps),
        model_bytes=_WEIGHT_BYTES[config.export_dtype] * weights,
    )


def plan_together(configs: Sequence[RunConfig], hardware: Hardware) -> RunPlan:
    """Plan the memory of runs that train together: of the one that takes most, beside the others.

    A run without a teacher stands beside that of the others, too.

    Raises:
        UserError: as `plan_run`, of any of them.
    """
    teacher = next((config.teacher for config in configs if config.teacher is not None), None)
    taught = [config.model_copy(update={"teacher": teacher}) for config in configs]
    plans = [
        plan_run(one, hardware, [*taught[:place], *taught[place + 1 :]]) for place, one in enumerate(taught)
    ]
    return max(plans, key=lambda plan: plan.memory.total)


def check_fits(configs: Sequence[RunConfig], kind: str, processes: int, together: int) -> str | None:
    """Refuse runs that cannot fit into the memory that is free now, before anything of them is there.

    Only what no setting of its mesh could make fit is refused; what the formula puts above the free memory
    may fit, because compiled code keeps less.

    Args:
        configs: a run, or those that train together.
        kind: type of the device, as torch names it.
        processes: of the run.
        together: how many of them are on this machine.

    Returns:
        A warning if they may not fit, else None.

    Raises:
        UserError: they cannot fit; the message has the table and what to turn.
    """
    try:
        plan = plan_together(configs, Hardware.here(kind, processes, together))
    except UserError:  # of a model of another family; what is wrong is said when the run is opened
        return None
    if plan.fits:
        return None
    return _explain(configs, plan, refuse=plan.least > plan.hardware.memory)


def out_of_memory(configs: Sequence[RunConfig], kind: str, processes: int, together: int) -> list[str]:
    """What to tell the user of a run that has run out of memory: the plan's table and what to turn.

    Args:
        configs: the run, or those that train together.
        kind: type of the device, as torch names it.
        processes: of the run.
        together: how many of them are on this machine.
    """
    try:
        plan = plan_together(configs, Hardware.here(kind, processes, together, free=False))
    except UserError as error:  # of a model of another family
        return [f"turn: a smaller micro_batch_tokens; there is no plan of this run ({error})"]
    return plan.memory_lines(remedies=True)


def _explain(configs: Sequence[RunConfig], plan: RunPlan, *, refuse: bool) -> str:
    total, memory = plan.memory.total / _GB, plan.hardware.memory / _GB
    names = ", ".join(config.name for config in configs)
    if len(configs) == 1:
        needs = f"run {names}: it {'needs' if refuse else 'may need'}"
    else:
        needs = f"runs {names}: together they {'need' if refuse else 'may need'}"
    first = f"{needs} {total:.2f} GB on each device, and {memory:.2f} GB are free"
    text = "\n".join([first, *plan.memory_lines(remedies=True)])
    if refuse:
        raise UserError(text)
    return text


def fewest_devices(
    config: RunConfig,
    shape: ModelShape,
    teachers: Sequence[ModelShape],
    cached: Sequence[ModelShape],
    vocab_size: int,
    device: str,
) -> tuple[int, MemoryPlan]:
    """How many devices of a kind a run takes, and its memory on each.

    That is `parallel.processes` if it fits on so many; else, if `shard` is auto, twice as many until it fits
    or dividing it further does not help.

    Args:
        config: the run.
        shape: of its student.
        teachers: shapes of those that run beside it.
        cached: shapes of those whose targets are kept before.
        vocab_size: of the token store.
        device: name of the kind.
    """

    def memory(devices: int) -> MemoryPlan:
        hardware = Hardware.named(device, devices)
        return plan_memory(footprint(config, shape, teachers, vocab_size, hardware, cached))

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


def _checkpoints(config: RunConfig, steps: int) -> int:
    """Checkpoints that are on disk at once, at most, with the one that is being written."""
    batch, kept = config.global_batch_tokens, config.checkpoint
    written = math.ceil(steps / whole_batches(kept.every, batch))  # the last step has one in any case
    for_good = 0 if kept.keep_every is None else steps // whole_batches(kept.keep_every, batch)
    return min(kept.keep + 1, written) + for_good + kept.keep_before_decay
