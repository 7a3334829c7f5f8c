"""Disks of a given size in a directory, really full when they are full; disks that lose their power."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(place, size):
    """Mount a disk in memory at a directory and yield a function that gives it another size.

    Only the system's administrator may; others skip the test.
    """
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.name == "nt" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def journaled_disk(image, place):
    """Mount the ext4 file system in the file `image`, which is made if there is none, at a directory.

    A copy of `image` made meanwhile is what a power cut would leave: what was written and not flushed is not
    in it, and mounting it replays the journal. Only the system's administrator may; others skip the test.
    """
    place.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(32 << 20)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4 here")
        subprocess.run(["mkfs.ext4", "-q", "-F", "-J", "size=4", str(image)], check=True)
    command = ["mount", "-o", "loop,commit=300", str(image), str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)
