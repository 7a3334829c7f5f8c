"""Kinds of devices by their data sheets (speed, memory, power), and the memory of a run on one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.errors import lookup

if TYPE_CHECKING:
    from tutelage.models.shapes import ModelShape


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


_STATE_BYTES = 16
"""Of a trained weight: itself, its gradient and AdamW's two moments, in float32."""
_CHUNK_BYTES = 2**28
"""The largest [chunk, V] float32 buffer of the objective on a GPU, of the student and of its teacher each."""


def activation_values(shape: ModelShape) -> int:
    """Values per token that a forward pass keeps for the backward pass, attention computed in blocks.

    Per layer: the input of each norm and its output (4 hidden), queries, keys and values, rotated queries and
    keys, what attention gives (3 heads + 3 kv_heads) head_dim, and in the MLP gate, its activation, up and
    their product (4 mlp). Qwen3 also norms queries and keys. On top the last norm: 2 hidden.
    """
    attention = 3 * (shape.heads + shape.kv_heads) * shape.head_dim
    if shape.family == "qwen3":
        attention += (shape.heads + shape.kv_heads) * shape.head_dim
    return shape.layers * (4 * shape.hidden + attention + 4 * shape.mlp) + 2 * shape.hidden


def run_memory(
    shape: ModelShape,
    parameters: int,
    teacher_parameters: int,
    micro_batch: int,
    vocab_size: int,
    *,
    bf16: bool,
) -> float:
    """Peak bytes of a run on one device, without what the libraries take for themselves.

    16 bytes per trained weight and 4 per weight of a live teacher, `activation_values` of a micro-batch in 2
    (bf16) or 4 bytes, and one buffer of logits each for student and teacher.

    Args:
        shape: of the trained model.
        parameters: its weights.
        teacher_parameters: weights of the teacher that runs beside it; 0 without.
        micro_batch: tokens of a forward pass.
        vocab_size: width of the logits.
        bf16: whether the forward pass is in bfloat16.
    """
    logits = min(4 * micro_batch * vocab_size, _CHUNK_BYTES) * (2 if teacher_parameters else 1)
    activations = micro_batch * activation_values(shape) * (2 if bf16 else 4)
    return _STATE_BYTES * parameters + 4.0 * teacher_parameters + activations + logits
