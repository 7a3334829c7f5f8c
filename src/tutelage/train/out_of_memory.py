"""Say in one line that a device's memory was not enough for a run, and what was in it."""

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


class LackOfMemoryError(UserError):
    """The memory of a device was not enough; whoever knows the run's plan adds what to turn."""


@contextlib.contextmanager
def memory_errors_named(students: Sequence[Student]) -> Iterator[None]:
    """Raise a failed allocation in the block as a `LackOfMemoryError` about the run of `students`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise LackOfMemoryError(_explained(students)) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


def _explained(students: Sequence[Student]) -> str:
    """What is known to be in memory."""
    lead = students[0]
    device = lead.world.device
    parameters = [parameter for student in students for parameter in student.model.parameters()]
    parts = {
        "weights": _size(parameters),
        "gradients": _size(p.grad for p in parameters if p.grad is not None),
        "moments": _size(t for s in students for state in s.optimizer.state.values() for t in state.values()),
    }
    held = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    most = f"{_gb(peak_memory(device))} at most"
    if device.type == "cuda":
        most += f" of {_gb(torch.cuda.get_device_properties(device).total_memory)}"
    many = f"; {len(students)} students train together, fewer take less" if len(students) > 1 else ""
    return (
        f"{lead.directory.path}: step {lead.step + 1}: out of memory on {device}: {most}, of which {held}; "
        f"the rest is activations, logits and teacher{many}"
    )


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of `tensors`."""
    held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in held)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
