"""Check files by `checksums.json` beside them, where their format has no room for a checksum of its own.

It lists files of its directory with sizes and CRC-32, and has a seal (`records`). A file that is not listed
was written by an older version, or put there by somebody else; it is used without a check.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tutelage.errors import UserError
from tutelage.files import atomic_write, regular
from tutelage.records import Record, UnreadableError, read_model, write_sealed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LISTING = "checksums.json"
CARD = "README.md"
"""A model card, which people may edit."""

_READ_BYTES = 1 << 24
_LARGE_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size of a file and CRC-32 of its content; computing it costs about a second per gigabyte."""

    bytes: int
    crc32: int


class _Listing(Record):
    """What a file may be, by its path: what was written last, and before."""

    files: dict[str, tuple[FileSum, ...]]


def file_sum(path: Path) -> FileSum:
    """Read a file and compute its checksum; once per process for a large one that stays as it is."""
    status = path.stat()
    known = path, status.st_size, status.st_mtime_ns, status.st_ino
    # A small one may change twice within a tick of its clock.
    return FileSum(status.st_size, (_crc32 if status.st_size >= _LARGE_BYTES else _crc32.__wrapped__)(*known))


@lru_cache(256)
def _crc32(path: Path, _size: int, _changed: int, _number: int) -> int:
    checksum = 0
    with open(path, "rb", opener=regular) as stream:
        while block := stream.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def difference(path: Path, *known: FileSum) -> str | None:
    """Why a file is none of those `known`, in words that follow its name; None if it is one."""
    try:
        size = path.stat().st_size
        if size not in {one.bytes for one in known}:
            return f"has {size:,} bytes and not {known[-1].bytes:,}"
        if file_sum(path) not in known:
            return "is damaged: its checksum is not the one that was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def write_checksums(directory: Path) -> None:
    """List every file below a directory that is complete."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != LISTING)
    _write(directory, {path.relative_to(directory).as_posix(): (file_sum(path),) for path in files})


@contextlib.contextmanager
def checked_write(path: Path) -> Iterator[Path]:
    """Replace a file as `atomic_write` does, and list it; one process at a time may write in a directory.

    The old content stays listed beside the new one, so that whenever the power is cut, the file is listed.

    Raises:
        UserError: the listing is damaged, or the file cannot be written.
    """
    try:
        known = listed(path.parent)
    except UnreadableError as error:
        raise UserError(f"{path.parent}: {error}") from None
    with atomic_write(path) as partial:
        yield partial
        new = file_sum(partial)
        _write(path.parent, known | {path.name: (*known.get(path.name, ())[-1:], new)})


def listed(directory: Path) -> dict[str, tuple[FileSum, ...]]:
    """What the files of a directory may be, by their paths in it; empty without a listing.

    Raises:
        UnreadableError: the listing is damaged.
    """
    path = directory / LISTING
    try:
        return read_model(path, _Listing).files if path.exists() else {}
    except UnreadableError:
        raise UnreadableError(LISTING, "damaged; delete it to use the files beside it unchecked") from None


def check_file(path: Path) -> None:
    """Compare a file with the listing beside it, if that has it.

    Raises:
        UnreadableError: it is missing, damaged or no file, or the listing is damaged.
    """
    _check(path, listed(path.parent).get(path.name, ()))


def _check(path: Path, known: tuple[FileSum, ...]) -> None:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UnreadableError(path.name, "is no file")
    if known and (reason := difference(path, *known)) is not None:
        raise UnreadableError(path.name, reason.removeprefix("is "))


def refuse_damage(directory: Path, *names: str) -> None:
    """Compare files with the listing of their directory; without `names` all that are not for people.

    Raises:
        UserError: one is missing or damaged, or the listing is.
    """
    try:
        for name, known in listed(directory).items():
            if name in names or not (names or name == CARD or "/" in name):
                _check(directory / name, known)
    except UnreadableError as error:
        raise UserError(
            f"{directory}: {error}; delete that directory and run again what made it, or delete its "
            f"{LISTING} if it was changed on purpose"
        ) from None


def _write(directory: Path, files: Mapping[str, tuple[FileSum, ...]]) -> None:
    fields = {name: [asdict(one) for one in files[name]] for name in sorted(files)}
    write_sealed(directory / LISTING, {"files": fields})
