"""The answer of `tutelage study plan`: what some studies take on a given machine, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError
from tutelage.study.estimate import by_kind, by_purpose, duration, largest, works_of
from tutelage.study.hardware import Device, find_device
from tutelage.study.planfile import load_plan
from tutelage.study.speed import Speeds, read_timings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tutelage.study.spec import StudyConfig

_FORMULA = (
    "16 bytes per weight (float32 weight, gradient, two moments) + 4 per weight of a live teacher "
    "+ activations of a micro-batch + a chunk of logits"
)
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


def forecast(studies: Sequence[StudyConfig], machine: Machine, directory: Path | None) -> dict[str, Any]:
    """What `studies` take, as JSON data.

    Args:
        studies: what is to be run; runs they share count once.
        machine: where.
        directory: of a study whose finished runs say how fast a device is; None: by the data sheet.

    Raises:
        UserError: a cell cannot be built, or a device is unknown.
    """
    works, caches, notes = works_of(studies)
    if not works:
        raise UserError(f"study {studies[0].name}: no runs; give students, or teachers to train")
    source, words, device = _source(machine, directory)
    took = duration(works, machine.devices, source, machine.mfu)
    most = largest(works)
    kinds = by_kind(works)
    names = {work.key: work.cell.name for work in works}
    return {
        "runs": {kind: {"runs": runs, "tokens": tokens} for kind, (runs, tokens) in kinds.items()},
        "total_runs": len(works),
        "total_tokens": sum(work.tokens for work in works),
        "flops": by_purpose(works, caches),
        "memory": {
            "bytes": most.memory,
            "run": most.cell.name,
            "fits": most.memory <= device.memory,
            "formula": _FORMULA,
        },
        "cache_bytes": caches.bytes,
        "source": words,
        "time": {"wall_seconds": took.wall, "device_seconds": took.device},
        "critical_path": {"seconds": took.path_seconds, "runs": [names[key] for key in took.path]},
        "energy_kwh": device.watts * took.device / _WATTS_HOUR,
        "price": machine.price,
        "cost": None if machine.price is None else machine.price * took.device / 3600,
        "notes": notes,
    }


def _source(machine: Machine, directory: Path | None) -> tuple[Device | Speeds, str, Device]:
    """Where speeds come from, that in words, and the device."""
    device = find_device(machine.device)
    if directory is not None:
        timings = read_timings(directory, load_plan(directory))
        if timings:
            words = f"{machine.devices} x what {len(timings)} finished runs of {directory} were trained on"
            return Speeds(timings), words, device
    reached = machine.mfu or device.mfu
    peak = f"{device.peak_flops / 1e12:g} TFLOP/s"
    words = f"{machine.devices} x {machine.device} ({device.summary}) at {reached:.0%} of {peak}"
    return device, words, device
