"""Read what control groups leave this process of its machine: those of a container, or of a batch job.

Versions 1 and 2 of Linux's groups; elsewhere, and where nothing limits, all is left. No torch is needed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left() -> float:
    """Bytes that may still be taken; what a group keeps of files gives way to what programs ask for."""
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


def cores() -> float:
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
