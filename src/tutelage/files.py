"""Ctrl-C and SIGTERM as an event that long work looks at, so that it stops where it can be taken up again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import threading
from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO


class BusyError(UserError):
    """Another process holds what was to be claimed."""


_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the write errors a user can mend into a `UserError` that names `path`."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(
                f"{path}: no space left on the device; free some and run the same command"
            ) from None
        if number in _FORBIDDEN:
            reason = os.strerror(number)
            raise UserError(f"{path}: cannot be written ({reason}); choose another directory") from None
        raise


def _errno(error: Exception) -> int:
    """The operating system's number of an error; libraries in Rust put it only into the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def make_directory(path: Path) -> Path:
    """Create `path` and its parents; return it. Raises `UserError` if that is not allowed."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_place(path: Path) -> None:
    """Raise `UserError` if `path` cannot become a directory, because it is a file or lies below one."""
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{path}: {there} is a file and no directory; choose another output")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name; it replaces `path` in one step if the block succeeds."""
    with _explained(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Replace `path` by `data` as JSON in one step."""
    write_text(path, json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it appears as `path` only if the block succeeds.

    An existing `path` is replaced. Leftovers of killed writers are removed first, so two processes must not
    write the same `path` at a time: hold it with `claimed`.
    """
    make_directory(path.parent)
    for leftover in path.parent.glob(f".partial-{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with _explained(path):
        partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                shutil.rmtree(path)
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def claimed(lock: Path, what: str) -> Iterator[None]:
    """Hold `what` for this process while the block runs; the kernel frees the claim of a dead process.

    The file `lock` is there while it is held, and longer only if the holder is killed.

    Raises:
        BusyError: another process holds it.
        UserError: `lock` cannot be written.
    """
    with _locked(lock, what) as file:
        try:
            with _explained(lock):  # unbuffered: what a full disk refuses now must not come back at close
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _locked(lock: Path, what: str) -> TextIO:
    """The file `lock`, opened and locked. One that its holder removed meanwhile is no claim: try again."""
    while True:
        with _explained(lock):
            file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read().strip() or "unknown"
            raise BusyError(f"{what}: process {owner} is already working on it") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in the main thread; elsewhere nothing sets it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: event.set()) for number in signals]
    try:
        yield event
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
