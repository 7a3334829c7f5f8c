"""The file of one shard: blocks back to back, then an index of where each ends and its checksum.

An index entry is 12 bytes, little endian: the end of the block as u64, whose top bit says that the block is
a zstd frame, and the CRC-32 of the stored bytes as u32. The number of blocks is known from the layout, so
the index needs no header.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from typing import TYPE_CHECKING

import zstandard

from tutelage.errors import UserError
from tutelage.teachers.cache.layout import ShardRecord

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from tutelage.teachers.cache.layout import Layout

_ENTRY = struct.Struct("<QI")
_ZSTD = 1 << 63
INDEX_BYTES = _ENTRY.size
"""Bytes per block beside the block."""

Packed = tuple[bytes, bool]
"""Stored bytes of a block, and whether they are a zstd frame."""


def packed(block: bytes, *, compress: bool) -> Packed:
    """The block as it is stored: compressed if that is asked for and makes it smaller."""
    if compress:
        frame = zstandard.ZstdCompressor().compress(block)
        if len(frame) < len(block):
            return frame, True
    return block, False


class ShardWriter:
    """Writes blocks to an open file, then the index."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._index = bytearray()
        self._end = 0

    @property
    def bytes(self) -> int:
        """Size of the shard up to now, with its index."""
        return self._end + len(self._index)

    def add(self, block: Packed) -> None:
        """Append one block."""
        stored, is_frame = block
        self._file.write(stored)
        self._end += len(stored)
        self._index += _ENTRY.pack(self._end | (_ZSTD if is_frame else 0), zlib.crc32(stored))

    def finish(self) -> None:
        """Append the index."""
        self._file.write(self._index)


def shard_record(cache: Path, layout: Layout, shard: int) -> ShardRecord | None:
    """The record of a shard as it lies on disk; None if it is missing or its index makes no sense."""
    blocks, positions = len(layout.blocks_of(shard)), layout.positions_of(shard)
    name = layout.file(shard)
    try:
        with (cache / name).open("rb") as file:
            size = file.seek(0, 2)
            data = size - blocks * INDEX_BYTES
            if data < 0:
                return None
            file.seek(data)
            index = file.read()
    except FileNotFoundError:
        return None
    ends = [end & ~_ZSTD for end, _ in _ENTRY.iter_unpack(index)]
    if ends != sorted(ends) or ends[-1] != data:
        return None
    return ShardRecord(
        file=name,
        first=positions.start,
        tokens=len(positions),
        bytes=size,
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


class ShardFile:
    """A finished shard, mapped from disk.

    Args:
        cache: the cache's directory.
        layout: of the cache.
        shard: its number.
        record: what the manifest says of it.

    Raises:
        UserError: it is missing or cut short.
    """

    def __init__(self, cache: Path, layout: Layout, shard: int, record: ShardRecord) -> None:
        self._path = cache / record.file
        self._layout = layout
        self._blocks = layout.blocks_of(shard)
        self._sha256 = record.index_sha256
        try:
            with self._path.open("rb") as file:
                # Private, not read-only: torch wants memory that it could write to, or else a copy.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error})") from None
        if len(self._map) != record.bytes:
            raise UserError(wrong_size(self._path, len(self._map), record.bytes))
        self._index = record.bytes - len(self._blocks) * INDEX_BYTES

    def check_index(self) -> None:
        """Compare the index with its checksum in the manifest.

        Raises:
            UserError: it is damaged.
        """
        if hashlib.sha256(self._map[self._index :]).hexdigest() != self._sha256:
            raise UserError(self._damaged("its index", self._layout.positions_of(self._number)))

    def block(self, block: int, *, check: bool) -> bytes | memoryview:
        """The bytes of a block (of the cache, not of the file), as the codec made them.

        Args:
            block: its number.
            check: compare it with its checksum first.

        Raises:
            UserError: it is damaged.
        """
        place = self._index + (block - self._blocks.start) * INDEX_BYTES
        end, crc = _ENTRY.unpack_from(self._map, place)
        start = 0
        if block > self._blocks.start:
            start = _ENTRY.unpack_from(self._map, place - INDEX_BYTES)[0] & ~_ZSTD
        stored = memoryview(self._map)[start : end & ~_ZSTD]
        if check and zlib.crc32(stored) != crc:
            first = block * self._layout.context_length
            raise UserError(self._damaged("a block", range(first, first + self._layout.block_tokens(block))))
        if end & _ZSTD:
            return zstandard.ZstdDecompressor().decompress(stored)
        return stored

    @property
    def _number(self) -> int:
        return self._blocks.start // self._layout.contexts_per_shard

    def _damaged(self, what: str, tokens: range) -> str:
        return (
            f"{self._path}: damaged ({what}, tokens {tokens.start:,} to {tokens.stop - 1:,}); "
            "delete this file and run the same `tutelage teach` again, which computes just it"
        )


def wrong_size(path: Path, found: int, expected: int) -> str:
    """What to say of a shard that was cut short or grown."""
    return (
        f"{path}: has {found} bytes, expected {expected}; delete this file and run the same "
        "`tutelage teach` again, which computes just it"
    )
