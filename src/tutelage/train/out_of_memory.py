"""Say in one line what a run needed when a device's memory was not enough, and what to turn."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from tutelage.errors import UserError
from tutelage.train.metrics import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from tutelage.train.student import Student

_SIGNS = ("out of memory", "not enough memory", "can't allocate memory")
"""Of the messages of torch's allocators, which are plain RuntimeErrors on the CPU."""


@contextlib.contextmanager
def memory_errors_to_user_errors(students: Sequence[Student]) -> Iterator[None]:
    """Turn a failed allocation in the block into a `UserError` about the run of `students`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(_explained(students)) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


def _explained(students: Sequence[Student]) -> str:
    """What is known to be in memory, and the settings that take less."""
    lead = students[0]
    device = lead.world.device
    parameters = [parameter for student in students for parameter in student.model.parameters()]
    parts = {
        "weights": _size(parameters),
        "gradients": _size(p.grad for p in parameters if p.grad is not None),
        "moments": _size(t for s in students for state in s.optimizer.state.values() for t in state.values()),
    }
    held = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    most = f"{_gib(peak_memory(device))} at most"
    if device.type == "cuda":
        most += f" of {_gib(torch.cuda.get_device_properties(device).total_memory)}"
    return (
        f"{lead.directory.path}: step {lead.step + 1}: out of memory on {device}: {most}, of which {held}; "
        f"the rest is activations, logits and teacher; {'; or '.join(_remedies(lead, len(students)))}"
    )


def _remedies(student: Student, cohort: int) -> list[str]:
    """What to turn, most effective first."""
    config = student.config
    length = config.data.sequence_length
    micro = config.micro_batch_tokens or config.global_batch_tokens
    found = []
    if micro > length:
        found.append(f"lower micro_batch_tokens ({micro:,} now, {length:,} at least; the result is the same)")
    if config.runtime.activation_checkpointing != "full":
        found.append("set runtime.activation_checkpointing: full")
    if student.teacher is not None and student.teacher.forward_flops:
        found.append("cache the teacher's targets (teacher.cache)")
    if cohort > 1:
        found.append("train fewer students together")
    found.append("start more processes, each with its own device, which share the weights (torchrun)")
    return found


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of `tensors`."""
    held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in held)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
