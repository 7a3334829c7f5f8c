"""Read which of a job's processes this is, and what of its machine control groups leave it.

The former is in the environment, as torchrun, Ray or Slurm's `srun` set it: nothing else in the package reads
these variables. Control groups are those of a container or of a batch job, of Linux's versions 1 and 2;
elsewhere, and where nothing limits, all is left. No torch is needed here.
"""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DIGITS = 6
_FIRST_PORT, _PORTS = 15_000, 10_000
"""Ports that Slurm jobs meet at: as many as here, chosen by job and step."""


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that work on the same run.

    Attributes:
        rank: number of the process, from 0.
        local_rank: its number among those of its machine.
        size: how many there are.
        local_size: how many of them are on its machine, at least.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def place() -> Place:
    """Return the place of this process; without WORLD_SIZE or with a WORLD_SIZE of 1 it is the only one.

    Raises:
        UserError: there are to be several processes, and a variable that says which this is is missing.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Place()
    if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE={size} is set, but not {', '.join(missing)}: start several processes with torchrun, "
            "srun or `tutelage train --nproc`, or unset WORLD_SIZE for one"
        )
    rank = _number("RANK", 0)
    if rank >= size:
        raise UserError(f"RANK={rank} must be less than WORLD_SIZE={size}")
    return Place(rank, _number("LOCAL_RANK", 0), size, _number("LOCAL_WORLD_SIZE", 1))


def cores() -> int:
    """Cores that this process may use: a batch system, `taskset` or a container may give it a part of all.

    A part of a core counts as one, as it does for joblib.
    """
    here = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return math.ceil(min(here, _quota()))


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables where `srun` started several tasks, each of which is to be one process.

    A batch script's own commands, an array job and what torchrun started stay as they are: they have no
    SLURM_STEP_NUM_TASKS above 1, or WORLD_SIZE already.

    Raises:
        UserError: a variable that srun sets is missing or no number.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks in ("", "1") or environment.get("WORLD_SIZE"):
        return
    job, step = (_of_slurm(environment, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    rank, local_rank = (_of_slurm(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    environment.update({"WORLD_SIZE": tasks, "RANK": str(rank), "LOCAL_RANK": str(local_rank)})
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    environment["LOCAL_WORLD_SIZE"] = str(tasks_on_node(counts, _of_slurm(environment, "SLURM_NODEID", "0")))
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 7 + step) % _PORTS))


def tasks_on_node(counts: str, node: int) -> int:
    """How many tasks a node has by a list of Slurm's, such as `8(x3),2`; 1 where that is not said."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    each = [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
    return each[node] if node < len(each) else 1


def first_node(nodes: str) -> str:
    """The first name in a list of Slurm's, such as `node[03-07,12],login1`: rank 0 runs there."""
    found = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\]([^,\[\]]*))?", nodes)
    if found is None:
        return nodes
    return "".join(part for part in found.groups() if part)


def _of_slurm(environment: Mapping[str, str], name: str, missing: str = "") -> int:
    text = environment.get(name, missing)
    if not text.isdecimal():
        raise UserError(f"{name}={text:.80}: it must be a whole number, as srun sets it")
    return int(text)


def _number(name: str, missing: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return missing
    if not text.isdecimal() or len(text) > _DIGITS or (name.endswith("WORLD_SIZE") and int(text) == 0):
        raise UserError(f"{name}={text:.80}: it must be a whole number, as torchrun sets it")
    return int(text)


_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left() -> float:
    """Bytes that may still be taken; a group's cache of files gives way to what programs ask for."""
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    v2 = ("memory.max", "memory.current", "inactive_file")
    left = [float("inf")]
    for group, is_second in _groups("memory"):
        most, used, cached = v2 if is_second else v1
        limit, usage, stat = (_read(group / name) for name in (most, used, "memory.stat"))
        if limit in ("", "max") or not usage:
            continue
        files = dict(line.split() for line in stat.splitlines()).get(cached, 0)
        left.append(float(limit) - float(usage) + float(files))
    return max(0.0, min(left))


def _quota() -> float:
    """Cores whose time may be used: the quota of `docker --cpus` or of a pod's limit, a fraction perhaps."""
    most = [float("inf")]
    for group, is_second in _groups("cpu"):
        if is_second:
            quota, _, period = _read(group / "cpu.max").partition(" ")
        else:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota not in ("", "max", "-1"):
            most.append(float(quota) / float(period))
    return min(most)


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """This process's groups that a controller may limit, each with those above it, and if they are version 2.

    A group that is not mounted here, as where a container sees its own as the root, has none of its own.
    """
    for line in _read(_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = _MOUNT / controller if controllers else _MOUNT
        group = mount / path.strip("/")
        yield from ((one, not controllers) for one in (group, *group.parents) if one.is_relative_to(mount))


def _read(file: Path) -> str:
    """What is in a file, empty if it is not there or may not be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
