"""Data parallelism over processes started by torchrun: replicated weights, summed gradients.

Without torchrun every function here is the identity of a world of one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from tutelage.models import hub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from tutelage.config.runtime_config import RuntimeConfig


@dataclass(frozen=True, slots=True)
class World:
    """This process among all, and the device it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def start(runtime: RuntimeConfig) -> World:
    """Set the threads, choose the device, and join the processes of torchrun if it started this one."""
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device = hub.pick_device(runtime.device)
    if "WORLD_SIZE" not in os.environ:
        return World(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(device, dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over processes; one message per dtype."""
    if not dist.is_initialized():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # the same order on every rank
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        start = 0
        for tensor in group:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


def fill_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give a parameter without a gradient zeros if another process has one for it.

    A layer that was dropped here was perhaps not dropped there, and gradients can only be summed if every
    process has the same ones.
    """
    if not dist.is_initialized():
        return
    missing = [int(parameter.grad is None) for parameter in parameters]
    count = torch.tensor(missing, device=parameters[0].device)
    dist.all_reduce(count)
    for parameter, processes in zip(parameters, count.tolist(), strict=True):
        if parameter.grad is None and processes < dist.get_world_size():
            parameter.grad = torch.zeros_like(parameter)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process, so that all leave the loop at the same step."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return bool(count)
