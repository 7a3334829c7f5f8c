"""Kinds of devices by their data sheets (speed, memory, power), and those that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tutelage.errors import lookup
from tutelage.processes import memory_left

_USABLE = 0.9
"""Part of a device's memory that a run may fill: CUDA, NCCL and gaps in the allocator take the rest."""
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device.

    Attributes:
        peak_flops: dense bf16 operations per second by its data sheet; of a CPU core, float32.
        watts: power by its data sheet.
        memory: bytes.
        mfu: part of the peak that training usually reaches.
        summary: name and source of the figures.
    """

    peak_flops: float
    watts: float
    memory: float
    mfu: float
    summary: str


DEVICES = {
    "b200": Device(2250e12, 1000, 180e9, 0.4, "NVIDIA B200 SXM, data sheet of 2024"),
    "h200": Device(989e12, 700, 141e9, 0.4, "NVIDIA H200 SXM, data sheet of 2024"),
    "h100": Device(989e12, 700, 80e9, 0.4, "NVIDIA H100 SXM, data sheet of 2023"),
    "a100": Device(312e12, 400, 80e9, 0.4, "NVIDIA A100 SXM 80 GB, data sheet of 2021"),
    "l40s": Device(362e12, 350, 48e9, 0.4, "NVIDIA L40S, data sheet of 2023"),
    "rtx4090": Device(165e12, 450, 24e9, 0.4, "NVIDIA GeForce RTX 4090, float32 accumulation"),
    "cpu": Device(96e9, 10, 4e9, 0.1, "one core at 3 GHz with two AVX2 units, float32; small models"),
}
"""Devices by the name users write."""


def find_device(name: str) -> Device:
    """The device called `name`.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    return lookup(DEVICES, name, "--device")


def recognise_device(name: str) -> Device | None:
    """The device that `torch.cuda.get_device_name` calls `name`, such as "NVIDIA H100 80GB HBM3".

    None if it is not in the table: another card, its slower PCIe version, or a part of a card (MIG).
    """
    words = name.lower().replace("rtx ", "rtx").replace("-", " ").split()
    if {"pcie", "mig", "cpu"} & set(words):
        return None
    return next((device for key, device in DEVICES.items() if key in words), None)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices of one kind, one process on each.

    Attributes:
        name: of the kind, for people.
        device: its figures.
        devices: how many there are.
        memory: bytes on each that a run may fill.
        cuda: whether they are GPUs of NVIDIA's.
        shared: whether they are processes on one memory, of which more of them have no more.
    """

    name: str
    device: Device
    devices: int
    memory: float
    cuda: bool
    shared: bool = False

    @property
    def kind(self) -> str:
        """Type of the device, as torch names it."""
        return "cuda" if self.cuda else "cpu"

    @classmethod
    def named(cls, name: str, devices: int) -> Hardware:
        """Devices of the table, which need not be here.

        Raises:
            UserError: the table has none of that name.
        """
        device = find_device(name)
        return cls(name, device, devices, _USABLE * device.memory, cuda=name != "cpu")

    @classmethod
    def of_run(cls, asked: str, processes: int) -> Hardware:
        """The devices of this machine that `runtime.device` asks for.

        Raises:
            UserError: it has none.
        """
        from tutelage.models.hub import pick_device  # noqa: PLC0415 - as below

        return cls.here(pick_device(asked).type, processes, processes)

    @classmethod
    def here(cls, kind: str, processes: int, together: int, *, free: bool = True) -> Hardware:
        """The devices of this machine of one of torch's types, with the memory that is free now.

        Args:
            kind: the type.
            processes: how many there are.
            together: how many of them are on this machine, and share its memory if they are on the CPU.
            free: False to count all memory of a GPU.
        """
        if kind != "cuda":
            memory = _available() / together
            return cls("cpu", find_device("cpu"), processes, memory, cuda=False, shared=True)
        import torch  # noqa: PLC0415 - the plan for devices of the table needs none

        name = torch.cuda.get_device_name()
        memory = torch.cuda.mem_get_info()[0 if free else 1]
        device = recognise_device(name) or replace(find_device("h100"), memory=memory, summary=name)
        return cls(name, device, processes, memory, cuda=True)


def _available() -> float:
    """Bytes that processes of this machine can still take, swap included; endless where that is not known."""
    if not _MEMINFO.is_file():
        return float("inf")
    fields = dict(line.split(":") for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
    free, swap = (1024.0 * int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    return min(free, memory_left()) + swap
