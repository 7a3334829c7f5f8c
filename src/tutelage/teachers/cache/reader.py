"""Read a teacher cache: targets by token position, mapped from disk and checked on first use."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from tutelage.config.teacher_config import HiddenFormat, incompatibility, sorts_in_vain
from tutelage.errors import UserError
from tutelage.files import regular
from tutelage.teachers.cache.codec import CodecSettings
from tutelage.teachers.cache.formats import make_codec
from tutelage.teachers.cache.layout import HEAD_FILE, WRITERS, read_cache_manifest
from tutelage.teachers.cache.shard import ShardFile
from tutelage.teachers.live import Teacher
from tutelage.types import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import Tensor

    from tutelage.config.objective_config import ObjectiveConfig
    from tutelage.data.store import Store
    from tutelage.teachers.cache.codec import CachedRows
    from tutelage.teachers.cache.layout import CacheManifest
    from tutelage.types import Batch, LogitTransform, Targets

_OPEN_FILES = 256
"""Mapped shards at a time: every map holds a file descriptor, and a process may have about 1000."""


class Cache:
    """An opened cache. Threads may read from it at the same time.

    Attributes:
        path: its directory.
        manifest: what it holds.
        bytes: size of its shards.
    """

    def __init__(self, path: Path, manifest: CacheManifest, size: int) -> None:
        self.path = path
        self.manifest = manifest
        self.bytes = size
        self._codec = make_codec(manifest.format, CodecSettings.of(manifest))
        self._lock = threading.Lock()
        self._shards: dict[int, ShardFile] = {}  # in order of use, the latest last
        self._checked_shards: set[int] = set()
        self._checked_blocks = bytearray(manifest.layout.blocks)

    def check_fits(self, store: Store, sequence_length: int, *, document_mask: bool) -> None:
        """Refuse a token store, a sequence length or a document mask that the cache was not written for.

        Raises:
            UserError: naming both values.
        """
        if store.fingerprint != self.manifest.store:
            raise UserError(
                f"teacher cache {self.path}: written for a token store with fingerprint "
                f"{self.manifest.store[:16]}, {store.path} has {store.fingerprint[:16]}; teach again on it"
            )
        context_length = self.manifest.layout.context_length
        if context_length % sequence_length:
            raise UserError(
                f"data.sequence_length = {sequence_length}: must divide the context_length of "
                f"teacher cache {self.path}, which is {context_length}"
            )
        if document_mask != self.manifest.document_mask:
            has, asked = str(self.manifest.document_mask).lower(), str(document_mask).lower()
            raise UserError(
                f"data.document_mask = {asked}: teacher cache {self.path} was written with document_mask = "
                f"{has}; set it to {has}, or teach again with the other"
            )

    def read(self, starts: Sequence[int], length: int) -> CachedRows:
        """The targets of `length` positions from each of `starts` on, one start after the other.

        Args:
            starts: multiples of `length`, not empty.
            length: a divisor of the context length, or of what ends with the split, any within a context.

        Returns:
            CPU tensors for N = len(starts) * length positions; they may be views of the cache, so do not
            write to them.

        Raises:
            UserError: a block is damaged; the message names file and tokens.
            ValueError: a start or the length is outside the grid, or beyond the split; or there is no start.
        """
        if len(starts) == 0:
            raise ValueError("no starts: give at least one place to read from")
        layout = self.manifest.layout
        last = layout.positions - length
        divides = length > 0 and layout.context_length % length == 0  # a negative number divides too
        rest = layout.positions % layout.context_length or layout.context_length  # of the last context
        for start in starts:
            is_end = start == last and 0 < length <= rest
            if not is_end and (not divides or start % length or not 0 <= start <= last):
                raise ValueError(
                    f"start {start}, length {length}: the cache has contexts of {layout.context_length} "
                    f"and {layout.positions} positions"
                )
        rows = [self._rows(start, length) for start in starts]
        kind: Any = type(rows[0])
        return rows[0] if len(rows) == 1 else kind.cat(rows)

    def head(self) -> tuple[Tensor, LogitTransform, Tensor | None]:
        """The teacher's output embedding [V, E], what it does to its logits, and its bias [V] or None.

        Raises:
            UserError: the file is missing or damaged.
            ValueError: the format keeps no hidden states.
        """
        if self.manifest.head_sha256 is None:
            raise ValueError(f"{self.path}: format {self.manifest.format.kind} has no head")
        self.check_head()
        parts = load_file(self.path / HEAD_FILE)
        return parts["head"], self.manifest.transform, parts.get("bias")

    def check_head(self) -> None:
        """Compare head.safetensors with its checksum; nothing to do where there is none.

        Raises:
            UserError: it is missing or damaged.
        """
        expected = self.manifest.head_sha256
        if expected is not None and file_sha256(self.path / HEAD_FILE) != expected:
            raise UserError(
                f"{self.path / HEAD_FILE}: missing or damaged; run the same {WRITERS} again to mend it"
            )

    def _rows(self, start: int, length: int) -> CachedRows:
        layout = self.manifest.layout
        block, offset = divmod(start, layout.context_length)
        file = self._shard(block // layout.contexts_per_shard)
        blob = file.block(block, check=not self._checked_blocks[block])
        self._checked_blocks[block] = 1
        tokens = layout.block_tokens(block)
        rows = self._codec.decode(blob, tokens)
        return rows if tokens == length else rows.rows(slice(offset, offset + length))

    def _shard(self, shard: int) -> ShardFile:
        with self._lock:
            file = self._shards.pop(shard, None)
            if file is None:
                file = ShardFile(self.path, self.manifest, shard)
            if shard not in self._checked_shards:
                file.check_index()
                self._checked_shards.add(shard)
            self._shards[shard] = file
            if len(self._shards) > _OPEN_FILES:
                del self._shards[next(iter(self._shards))]
            return file


def open_cache(path: Path | str) -> Cache:
    """Open a teacher cache and check that it is complete.

    Raises:
        UserError: it is no cache, has another schema version, is unfinished, or a file is missing or has
            the wrong size.
    """
    path = Path(path)
    manifest = read_cache_manifest(path)
    if (missing := _missing(path, manifest)) is not None:
        raise missing
    sizes = [ShardFile(path, manifest, shard).bytes for shard in range(manifest.layout.shards)]
    return Cache(path, manifest, sum(sizes))


def _missing(path: Path, manifest: CacheManifest) -> UserError | None:
    """What to say of the shards that are not there; None if all are."""
    layout = manifest.layout
    present = {file.name for file in (path / "shards").glob("*.bin")}
    files = (path / layout.file(shard) for shard in range(layout.shards))
    missing = next((file for file in files if file.name not in present), None)  # few are there to be passed
    if missing is None:
        return None
    known = sum(file.removesuffix(".bin").isdecimal() for file in present)
    return UserError(
        f"{missing}: missing, {known} of {layout.shards} shards done; "
        f"run the same {WRITERS} again, which computes just what is missing, or delete {path} if nothing "
        "needs it any more"
    )


def damaged_parts(path: Path, advance: Callable[[int], None]) -> Iterator[UserError]:
    """Read a teacher cache in full: what is wrong with its manifest, its head and each of its shards.

    Args:
        path: its directory.
        advance: told the bytes as they are read.
    """
    try:
        manifest = read_cache_manifest(path)
    except UserError as error:
        yield error
        return
    if (missing := _missing(path, manifest)) is not None:
        yield missing
    numbers = (file.stem for file in (path / "shards").glob("*.bin"))
    shards = sorted({int(number) for number in numbers if number.isdecimal()})
    there = [shard for shard in shards if shard < manifest.layout.shards]
    checks: list[Callable[[], None]] = [Cache(path, manifest, 0).check_head]
    checks += [partial(_check_shard, path, manifest, shard, advance) for shard in there]
    for check in checks:
        try:
            check()
        except UserError as error:
            yield error


def _check_shard(path: Path, manifest: CacheManifest, shard: int, advance: Callable[[int], None]) -> None:
    file = ShardFile(path, manifest, shard)
    file.check_index()
    for block in manifest.layout.blocks_of(shard):
        file.block(block, check=True)
    advance(file.bytes)


def file_sha256(path: Path) -> str | None:
    """Checksum of a file; None if it cannot be read."""
    try:
        with open(path, "rb", opener=regular) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def check_serves(path: Path, objective: ObjectiveConfig) -> None:
    """Raise UserError if a cache cannot give what an objective asks for."""
    manifest = read_cache_manifest(path)
    reason = incompatibility(manifest.format, manifest.temperature, objective, str(path))
    kinds = [kind for kind, _ in manifest.teacher.parts] or [manifest.teacher.kind]
    if (reason := reason or sorts_in_vain(objective, kinds)) is not None:
        raise UserError(reason)


class CachedTeacher(Teacher):
    """A teacher whose targets are read from a cache. A thread reads those of the next step during this one.

    Args:
        cache: an opened cache that fits the store and the sequence length.
        device: where the targets are wanted.
    """

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.retained = cache.manifest.format
        self.notes = cache.manifest.teacher.notes
        self._cache = cache
        self._device = device
        self._head_VE: Tensor | None = None
        self._bias_V: Tensor | None = None
        if isinstance(cache.manifest.format, HiddenFormat):
            head_VE, _, bias_V = cache.head()
            self._head_VE = head_VE.to(device)
            self._bias_V = None if bias_V is None else bias_V.to(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._prefetched: dict[tuple[tuple[int, ...], int], Future[CachedRows]] = {}

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Start to read the targets of the next step's batches."""
        for key in list(self._prefetched)[: -len(batches)]:  # a step that did not ask for its targets
            del self._prefetched[key]
        for batch in batches:
            key = batch.starts, batch.tokens_BT.shape[1]
            self._prefetched[key] = self._thread.submit(self._cache.read, *key)

    def targets(self, batch: Batch) -> Targets:
        """The cached targets of all positions of `batch`, on the training device.

        Raises:
            UserError: a block of the cache is damaged; the message names file and range.
        """
        key = batch.starts, batch.tokens_BT.shape[1]
        prefetched = self._prefetched.pop(key, None)
        rows = self._cache.read(*key) if prefetched is None else prefetched.result()
        if isinstance(rows, SparseTargets):
            return rows.to(self._device)
        assert self._head_VE is not None  # noqa: S101 - hidden rows come with a head
        hidden_NE = rows.hidden_NE.to(self._device, self._head_VE.dtype)
        return DenseTargets(hidden_NE, self._head_VE, self._cache.manifest.transform, self._bias_V)
