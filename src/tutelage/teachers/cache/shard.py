"""The file of one shard: blocks back to back, an index of where each ends with its checksum, and a seal.

An index entry is 12 bytes, little endian: the end of the block as u64, whose top bit says that the block is
a zstd frame, and the CRC-32 of the stored bytes as u32. The number of blocks is known from the layout. The
seal is the SHA-256 of the index, the cache's fingerprint and the shard's number: a file that was renamed, or
belongs to another cache, does not pass.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from typing import TYPE_CHECKING

import zstandard

from tutelage.errors import UserError
from tutelage.files import regular
from tutelage.teachers.cache.layout import WRITERS

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from tutelage.teachers.cache.layout import CacheManifest

_ENTRY = struct.Struct("<QI")
_ZSTD = 1 << 63
_SEAL_BYTES = 32
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


def _seal(index: bytes | bytearray, manifest: CacheManifest, shard: int) -> bytes:
    return hashlib.sha256(bytes(index) + f"{manifest.fingerprint}:{shard}".encode()).digest()


class ShardWriter:
    """Writes blocks to an open file, then index and seal."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._index = bytearray()
        self._end = 0

    @property
    def bytes(self) -> int:
        """Size of the shard up to now, as if it were finished."""
        return self._end + len(self._index) + _SEAL_BYTES

    def add(self, block: Packed) -> None:
        """Append one block."""
        stored, is_frame = block
        self._file.write(stored)
        self._end += len(stored)
        self._index += _ENTRY.pack(self._end | (_ZSTD if is_frame else 0), zlib.crc32(stored))

    def finish(self, manifest: CacheManifest, shard: int) -> None:
        """Append index and seal of a shard whose blocks are all there."""
        self._file.write(self._index + _seal(self._index, manifest, shard))


class ShardFile:
    """A finished shard, mapped from disk.

    Attributes:
        bytes: size of the file.

    Args:
        cache: the cache's directory.
        manifest: of the cache.
        shard: number of the shard.

    Raises:
        UserError: it is missing, was cut short or has grown.
    """

    def __init__(self, cache: Path, manifest: CacheManifest, shard: int) -> None:
        self._path = cache / manifest.layout.file(shard)
        self._manifest, self._shard = manifest, shard
        self._blocks = manifest.layout.blocks_of(shard)
        try:
            with open(self._path, "rb", opener=regular) as file:
                # Private, not read-only: torch wants memory that it could write to, or else a copy.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise self._damaged(f"cannot be read: {error}") from None
        self.bytes = len(self._map)
        self._index = self.bytes - _SEAL_BYTES - len(self._blocks) * INDEX_BYTES
        if self._index < 0 or self._span(self._blocks[-1])[1] != self._index:
            raise self._damaged(f"its size of {self.bytes:,} bytes is not what its index says")

    def check_index(self) -> None:
        """Compare the index with the seal.

        Raises:
            UserError: one of them is damaged, or the file is another shard's.
        """
        index, seal = self._map[self._index : -_SEAL_BYTES], self._map[-_SEAL_BYTES:]
        if _seal(index, self._manifest, self._shard) != seal:
            raise self._damaged("its index")

    def block(self, block: int, *, check: bool) -> bytes | memoryview:
        """The bytes of a block (of the cache, not of the file), as the codec made them.

        Args:
            block: its number.
            check: compare it with its checksum first.

        Raises:
            UserError: it is damaged.
        """
        start, end, is_frame, crc = self._span(block)
        stored = memoryview(self._map)[start:end]
        if check and zlib.crc32(stored) != crc:
            layout = self._manifest.layout
            first = block * layout.context_length
            raise self._damaged("a block", range(first, first + layout.block_tokens(block)))
        return zstandard.ZstdDecompressor().decompress(stored) if is_frame else stored

    def _span(self, block: int) -> tuple[int, int, bool, int]:
        """(start, end, whether it is a zstd frame, CRC-32) of a block."""
        place = self._index + (block - self._blocks.start) * INDEX_BYTES
        end, crc = _ENTRY.unpack_from(self._map, place)
        start = 0
        if block > self._blocks.start:
            start = _ENTRY.unpack_from(self._map, place - INDEX_BYTES)[0] & ~_ZSTD
        return start, end & ~_ZSTD, bool(end & _ZSTD), crc

    def _damaged(self, what: str, tokens: range | None = None) -> UserError:
        tokens = tokens or self._manifest.layout.positions_of(self._shard)
        return UserError(
            f"{self._path}: damaged ({what}, tokens {tokens.start:,} to {tokens.stop - 1:,}); "
            f"delete this file and run the same {WRITERS} again, which computes just it"
        )
