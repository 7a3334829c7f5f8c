"""Disks for the cases: in memory with a size and a number of files, and ext4 images that lose their power."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEW_MOUNTS = 0x00020000
"""CLONE_NEWNS of <sched.h>."""

IMAGE_BYTES = 48 << 20


def own_mounts() -> None:
    """Give this process mounts of its own, which nobody else sees and which are gone with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _call("mount", "--make-rprivate", "/")


@contextlib.contextmanager
def memory_disk(place: Path, options: str = "size=1g") -> Iterator[None]:
    """A disk in memory at a directory."""
    _call("mount", "-t", "tmpfs", "-o", options, "tmpfs", place)
    try:
        yield
    finally:
        _unmount(place)


def remount(place: Path, options: str) -> None:
    """Change the options of what is mounted at a directory."""
    _call("mount", "-o", f"remount,{options}", place)


class PowerCutDisk:
    """An ext4 disk at a directory, whose power can be cut: what was not written to it then is lost."""

    def __init__(self, place: Path, options: str) -> None:
        self.place = place
        self.options = options
        self._image = place.with_name(f"disk-{os.getpid()}")
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        _call("mkfs.ext4", "-q", "-F", "-m", "0", self._image)
        self._mount()

    def _mount(self) -> None:
        _call("mount", "-o", f"loop,{self.options}", self._image, self.place)

    def copy(self) -> None:
        """Remember what is on the disk at this moment; what waits in memory to be written is not."""
        shutil.copyfile(self._image, f"{self._image}-cut")

    def restart(self) -> None:
        """Go on with the disk as it was remembered; its journal is replayed. Nothing may be open on it."""
        _unmount(self.place)
        Path(f"{self._image}-cut").replace(self._image)
        self._mount()

    def remove(self) -> None:
        """Let the disk go."""
        _unmount(self.place)
        self._image.unlink()
        Path(f"{self._image}-cut").unlink(missing_ok=True)


def _unmount(place: Path) -> None:
    done = subprocess.run(["umount", place], check=False, capture_output=True)  # noqa: S607 - the system's
    if done.returncode:
        _call("umount", "--lazy", place)


def bind(place: Path, other: Path) -> None:
    """Show a directory at another one's path."""
    _call("mount", "--bind", place, other)


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
