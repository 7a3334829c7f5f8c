"""Files with a checksum for every block, written once; a block is checked when it is first read.

Beside `NAME` lies `NAME.crc32`: one uint32 per 64 KiB. So a flipped bit is found where it would be used, also
in a file that is never read whole.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tutelage.errors import UserError
from tutelage.files import read_bytes, regular

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    from numpy.typing import NDArray

BLOCK_BYTES = 2**16


class Sliced(Protocol):
    """An array that is read slice by slice: a NumPy array, or one in a file."""

    def __len__(self) -> int:
        """Number of entries."""

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        """The entries of a slice without a step."""


class CheckedFile:
    """A file that is written from its beginning to its end, with its checksums. `stack` closes it."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._file = stack.enter_context(path.open("wb"))
        self._hash = hashlib.sha256()
        self._sums: list[int] = []
        self._sum = self._in_block = 0

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._hash.update(data)
        self._file.write(data)
        rest = memoryview(data)  # slices of bytes would be copies
        while rest:
            room = BLOCK_BYTES - self._in_block
            part, rest = rest[:room], rest[room:]
            self._sum = zlib.crc32(part, self._sum)
            self._in_block += len(part)
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._sums.append(self._sum)
        self._sum = self._in_block = 0

    def finish(self) -> dict[str, str]:
        """Flush to the disk; return the SHA-256 of the file and of its checksums, by name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._in_block:
            self._end_block()
        sums = np.array(self._sums, "<u4").tobytes()
        beside = checksum_path(self._path)
        beside.write_bytes(sums)
        return {self._path.name: self._hash.hexdigest(), beside.name: hashlib.sha256(sums).hexdigest()}


def checksum_path(path: Path) -> Path:
    """Where the checksums of a file lie."""
    return path.with_name(f"{path.name}.crc32")


class CheckedArray:
    """The array in a file, mapped and read-only.

    Args:
        path: of the file.
        dtype: of its entries.
        length: number of entries.
        sha256: of its checksums.

    Raises:
        UserError: the checksums are missing or damaged, and, from any reading, a block is damaged.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int, sha256: str) -> None:
        self._path = path
        self._sums = _read_sums(checksum_path(path), sha256)
        # An empty file cannot be mapped.
        self._array = _mapped(path, dtype, length) if length else np.zeros(0, dtype)
        self._bytes = self._array.view(np.uint8)
        self._checked = np.zeros(len(self._sums), np.bool_)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self._array))
        size = self._array.itemsize
        blocks = slice(start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES))
        if not self._checked[blocks].all():
            self._check(range(blocks.start, blocks.stop))
        return self._array[start:stop]

    def _check(self, blocks: range) -> None:
        for block in blocks:
            place = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
            if not self._checked[block] and zlib.crc32(self._bytes[place].data) != self._sums[block]:
                raise UserError(
                    f"{self._path}: damaged between bytes {place.start:,} and {place.stop:,} (checksum); "
                    f"delete {self._path.parent} and build it again"
                )
            self._checked[block] = True


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    try:
        with open(path, "rb", opener=regular) as file:
            return np.memmap(file, dtype, mode="r", shape=(length,))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the token store is incomplete") from None


def _read_sums(path: Path, sha256: str) -> NDArray[np.uint32]:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the token store is incomplete") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: damaged (sha256); delete {path.parent} and build it again")
    return np.frombuffer(content, "<u4")
