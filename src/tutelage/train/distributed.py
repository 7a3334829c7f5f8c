"""Join the processes of a run: one per device, on a mesh of copies of the model and shards of each copy.

One process alone is a world of one, without a mesh: every function here then does nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh

from tutelage import agreement, processes
from tutelage.errors import UserError, one_line
from tutelage.models import hub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from tutelage.config.runtime_config import ParallelConfig, RuntimeConfig

MESH_AXES = ("replicate", "shard")
_GROUPS = itertools.count()


@dataclass(frozen=True, slots=True)
class World:
    """This process among all, and the device it computes on.

    Attributes:
        device: the device, with its number where there are several processes.
        rank: number of the process, from 0.
        local_rank: its number among those of its machine.
        size: how many processes there are.
        local_size: how many of them are on its machine, at least.
        mesh: all devices, by copy ("replicate") and part of a copy ("shard"); None for one process.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def start(runtime: RuntimeConfig, parallel: ParallelConfig) -> World:
    """Set the threads, choose the device of this process, and join the others of the run if there are any.

    Raises:
        UserError: the device is missing, there are too few, or the processes do not fit the mesh asked for.
    """
    place = processes.place()
    with agreement.together(parallel.timeout):
        device = hub.pick_device(runtime.device)
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)
        if place.size == 1:
            return World(device)
        try:
            shape = parallel.mesh(place.size)
        except ValueError as error:
            raise UserError(f"parallel: {error}") from None
        device = _own_device(device, place)
    with agreement.together(parallel.timeout):
        mesh = _join(device, place, shape, timedelta(seconds=parallel.timeout))
    return World(device, place.rank, place.local_rank, place.size, place.local_size, mesh)


def _join(
    device: torch.device, place: processes.Place, shape: tuple[int, int], wait: timedelta
) -> DeviceMesh:
    """Make the process group and the mesh; a message that takes longer than `wait` ends the process."""
    on_cuda = device.type == "cuda"
    store = PrefixStore(f"group {next(_GROUPS)}", agreement.meeting_place())
    try:
        with agreement.waiting_for_others():
            if not dist.is_initialized():
                dist.init_process_group(
                    # Checkpoints that are written in the background exchange messages on the CPU.
                    "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                    timeout=wait,
                    store=store,
                    rank=place.rank,
                    world_size=place.size,
                    device_id=device if on_cuda else None,
                )
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=MESH_AXES)
    except dist.DistError as error:  # two processes on one GPU, for example
        raise UserError(f"the processes cannot exchange messages: {one_line(error)}") from None
    for group in mesh.get_all_groups():  # new groups take torch's own timeout, not that of all processes
        group.set_timeout(wait)
    return mesh


def _own_device(device: torch.device, place: processes.Place) -> torch.device:
    """Return the device of one of several processes, bound to it before anything is sent.

    A process that sees one GPU only takes it: Slurm and Ray can give each its own.
    """
    if device.type == "mps":
        raise UserError(
            f"runtime.device = mps: {place.size} processes cannot share it; use 'cpu', or one process"
        )
    if device.type != "cuda":
        return device
    seen = torch.cuda.device_count()
    number = 0 if seen == 1 else place.local_rank
    if number >= seen:
        raise UserError(
            f"runtime.device = cuda: there are {seen} GPUs, none is left for process "
            f"{place.local_rank} (from 0) of this machine; start one process per GPU"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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


def gather(values: Tensor) -> Tensor:
    """The values of every process, one row each, in the order of their ranks."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values)
    return torch.stack(found)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any process, so that all leave the loop at the same step.

    The processes ask each other on the CPU: a GPU that is behind with its work is not waited for.
    """
    if not dist.is_initialized():
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)
