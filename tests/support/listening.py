"""Which addresses a process and its children listen at, as the kernel says."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from pathlib import Path

_LISTEN, _CLOSED = "0A", "07"  # states of a TCP and of a UDP socket that waits for anybody


def descendants(root: int) -> set[int]:
    """The process `root` and all that it started, as far as they still have their parents."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, more = {root}, {root}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses of the sockets of these processes that wait for others, "address:port"."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for link in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):  # it is closed
                    inodes.add(str(link.readlink()))
    found = set()
    for table, state in (("tcp", _LISTEN), ("tcp6", _LISTEN), ("udp", _CLOSED), ("udp6", _CLOSED)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == state and f"socket:[{words[9]}]" in inodes:
                address, _, port = words[1].partition(":")
                found.add(f"{_written(address)}:{int(port, 16)}")
    return found


def _written(address: str) -> str:
    """An address as people write it, from the kernel's words of four bytes in the machine's order."""
    raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    place = ip_address(raw)
    mapped = place.ipv4_mapped if place.version == 6 else None
    return str(mapped or place)
