"""Write files so that they appear whole or not at all, lock what one process may work on."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import SoftFileLock, Timeout, lock_descriptor

from tutelage.errors import DiskError, Stopped, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO


class LockedError(UserError):
    """Another process holds the lock; the message names it and its machine."""


_TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}")
"""Names that `atomic_write` writes under."""

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
"""Numbers of the errors of a full disk, and of a user's full share of one."""

_FORBIDDEN = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT),
    *(errno.EISDIR, errno.EFBIG),
    # a symbolic link, a hard link or a pipe where a file of ours belongs
    *(errno.ELOOP, errno.EMLINK, errno.ENXIO),
}


def no_space(path: Path | str) -> str:
    """What to say where `path` could not be written because the disk is full."""
    return f"{path}: no space left on the device; free some and run the same command"


@contextlib.contextmanager
def os_errors_to_user_errors(path: Path) -> Iterator[None]:
    """Raise the write errors that a user can repair as a `UserError` that names `path`."""
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if number in NO_SPACE:
            raise DiskError(no_space(path)) from None
        if number in _FORBIDDEN:
            reason = os.strerror(number)
            raise UserError(
                f"{path}: cannot be written ({reason}); use a directory where you may write (a copy will do)"
            ) from None
        raise


def errno_of(error: Exception) -> int:
    """Return the number of an error of the system; of some libraries it is only in the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    where = r"\[Errno (\d+)\]" if isinstance(error, shutil.Error) else r"\(os error (\d+)\)"
    found = re.search(where, str(error))
    return int(found[1]) if found else 0


def make_directory(path: Path) -> Path:
    """Create `path` and its parents; return it.

    A link on the way to another disk is followed if this user or the system's made it.

    Raises:
        UserError: that is not allowed, or there is a link of another user, who chose where it leads.
    """
    refuse_links(path)
    with os_errors_to_user_errors(path):
        new = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for place in new:  # a file that is flushed is lost all the same where its directory's name is
            flush(place.parent)
    return path


def refuse_links(path: Path) -> None:
    """Raise `UserError` if `path` is or lies below a link of another user, who chose where it leads."""
    if sys.platform != "win32":
        for place in (path, *path.parents):
            if place.is_symlink() and place.lstat().st_uid not in {0, os.geteuid()}:
                raise UserError(f"{place}: a link that another user made; remove it or use another directory")


def own_directory(path: Path) -> Path:
    """As `make_directory`, for a directory that only we fill: one that is a link is refused."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link; remove it, so that nothing is written where it leads")
    return make_directory(path)


def remove(path: Path) -> None:
    """Remove what is at `path`, if anything: a directory with all that is in it; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise `UserError` if `path` cannot become a directory, because it is a file or lies below one."""
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{path}: {there} is a file and no directory; choose another output")


def free_bytes(path: Path) -> int:
    """Return the free space of the device that holds `path`, or that will hold it once it exists."""
    place = path.absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def short(number: float, units: Sequence[str] = ("", "K", "M", "B", "T")) -> str:
    """Format a number with three digits and a unit, each a thousand of the one before: "950", "12.3K"."""
    for unit in units[:-1]:
        if number < 999.5:  # noqa: PLR2004 - three digits
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}{units[-1]}"


def size_text(count: float) -> str:
    """Format a number of bytes: "950 bytes", "3.13 KB", "12.3 MB"."""
    return short(count, (" bytes", " KB", " MB", " GB", " TB"))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name; it replaces `path` in one step if the block succeeds.

    After a power cut `path` holds the old content or the new, never a part. Links are not followed: the
    temporary file is a new one, under a name that cannot be known before.
    """
    with os_errors_to_user_errors(path):
        partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = partial.stat().st_mode
        try:
            yield partial
            partial.chmod(mode)  # some libraries make files that only their owner may read
            flush(partial)
            partial.replace(path)
            flush(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def remove_leftovers(*directories: Path) -> None:
    """Remove what killed writers left of files in directories that the caller holds with `lock`."""
    for path in chain.from_iterable(directory.glob(".*") for directory in directories):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # which flushes names by itself and opens no directories
        return
    # Windows flushes only files that may be written.
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Replace `path` by `data` as JSON in one step."""
    write_text(path, json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it appears as `path` only if the block succeeds.

    An existing `path` is replaced. Leftovers of killed writers are removed first, so two processes must not
    write the same `path` at a time: hold it with `lock`.
    """
    make_directory(path.parent)
    for leftover in path.parent.glob(f".partial-{glob.escape(path.name)}-*"):
        with contextlib.suppress(OSError):
            remove(leftover)
    with os_errors_to_user_errors(path):
        partial = path.with_name(f".partial-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        partial.mkdir()
        try:
            yield partial
            publish(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial: Path, path: Path) -> None:
    """Give a directory that is complete its name, for good once this returns; an older `path` is replaced."""
    flush_directory(partial)
    remove(path)
    partial.replace(path)
    flush(path.parent)


def flush_directory(path: Path) -> None:
    """Wait until everything below `path` would survive a power cut, and let files be read as new ones are.

    Some libraries make files that only their owner may read, which would shut out the others of a group.
    """
    probe = path / f".mode-{secrets.token_hex(4)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for folder, _, names in os.walk(path, topdown=False):
        for file in (Path(folder) / name for name in names):
            if not file.is_symlink():
                file.chmod(mode)
                flush(file)
        flush(Path(folder))


_NO_WAIT = os.O_NONBLOCK if sys.platform != "win32" else 0
_NO_LINK = os.O_NOFOLLOW | _NO_WAIT if sys.platform != "win32" else 0


def no_links(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses what somebody else may have put there to be written through.

    That is a link, symbolic or hard, or something that is no file. A pipe is not waited for.
    """
    number = os.open(path, flags | _NO_LINK, 0o666)
    found = os.fstat(number)
    if found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise OSError(errno.EMLINK if found.st_nlink > 1 else errno.ENXIO, "no file of its own", path)
    return number


def regular(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses to read what is no file: a pipe would be waited for.

    What a command reads because a person named it, such as a config, may be a pipe.
    """
    number = os.open(path, flags | _NO_WAIT)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "it is no file but a pipe or a device", path)
    return number


def read_bytes(path: Path) -> bytes:
    """Read a file as a whole, if it is one. Raises OSError."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold `what` for this process while the block runs.

    The file `path` exists while the lock is held and names the holder; it outlives only a killed holder.
    Where the file system has locks (`flock`, or `LockFileEx` on Windows; on a network file system its
    server's), a dead process holds nothing, whichever machine it ran on. Where it has none, the existence of
    `path` is the lock: a holder that died on this machine is noticed, but one that died on another cannot be
    told from a busy one, and the message says which file to delete.

    A file system mounted so that locks end at the machine (Lustre's `localflock`, NFS's `local_lock`) looks
    like one with locks. There only the leases of a study keep two machines apart.

    Raises:
        LockedError: another process holds it.
        UserError: `path` cannot be written.
    """
    with os_errors_to_user_errors(path):
        has_locks = _has_locks(path.parent)
    with _kernel_lock(path, what) if has_locks else _marker_lock(path, what):
        yield


@contextlib.contextmanager
def lock_when_free(path: Path, what: str, wait: Callable[[], bool]) -> Iterator[None]:
    """As `lock`, but call `wait` as long as another process holds it; `wait` returns True to give up.

    Raises:
        Stopped: `wait` returned True.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(path, what))
                break
            except LockedError:
                if wait():
                    raise Stopped from None
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path` now; one that was killed does not."""
    try:
        with path.open("r+b") as file:
            return not lock_descriptor(file.fileno(), blocking=False)
    except FileNotFoundError:
        return False
    except OSError:  # no locks here, or another's file: what exists is taken for held
        return True


@cache
def _has_locks(directory: Path) -> bool:
    """Whether files in `directory` can be locked, tried on a file that nobody else opens."""
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            return lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise


@contextlib.contextmanager
def _kernel_lock(path: Path, what: str) -> Iterator[None]:
    with _locked_file(path, what) as file:
        try:
            with os_errors_to_user_errors(path):
                file.truncate(0)
                file.write(f"\n{os.getpid()}\n{socket.gethostname()}\n".encode())
            yield
        finally:
            if os.name == "nt":  # refuses to remove an open file, another holder's too
                file.close()
            with contextlib.suppress(OSError):  # elsewhere a closed one could be another holder's already
                path.unlink()


def _locked_file(path: Path, what: str) -> BinaryIO:
    """Open and lock `path`. A file that its holder removed meanwhile locks nothing: try again."""
    while True:
        with os_errors_to_user_errors(path):
            # Unbuffered: what a full disk refuses now must not come back at close.
            file = open(path, "a+b", buffering=0, opener=no_links)  # noqa: SIM115 - held by the caller
        if not lock_descriptor(file.fileno(), blocking=False):
            with file:
                file.seek(1)  # Windows lets nobody else read the first byte, which is the one locked
                raise LockedError(_busy(what, file.read()))
        with contextlib.suppress(FileNotFoundError), path.open("rb") as now:  # stat may be stale on NFS
            if os.path.samestat(os.fstat(file.fileno()), os.fstat(now.fileno())):
                return file
        file.close()


@contextlib.contextmanager
def _marker_lock(path: Path, what: str) -> Iterator[None]:
    try:
        with os_errors_to_user_errors(path):
            marker = SoftFileLock(path, timeout=0.1, poll_interval=0.02).acquire()
    except Timeout:
        record = b""
        with contextlib.suppress(OSError):
            record = read_bytes(path)
        raise LockedError(
            f"{_busy(what, record)} (this file system has no locks: if that process is gone, delete {path})"
        ) from None
    with marker:
        yield


def _busy(what: str, record: bytes) -> str:
    process, host, *_ = [*record.decode(errors="replace").split(), "unknown", "unknown"]
    return f"{what}: process {process} on {host} is already working on it"
