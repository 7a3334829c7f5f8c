"""Write a teacher cache, in one process or several, from the beginning or from where it was left."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from tutelage.errors import DiskError, Stopped, UserError
from tutelage.files import (
    LockedError,
    atomic_write,
    free_bytes,
    lock,
    lock_when_free,
    make_directory,
    size_text,
)
from tutelage.progress import NullProgress
from tutelage.records import write_manifest_file
from tutelage.stopping import stop_signal
from tutelage.teachers.cache.job import load_job, memory_warning, plan_cache
from tutelage.teachers.cache.layout import HEAD_FILE, MANIFEST_FILE, read_cache_manifest
from tutelage.teachers.cache.reader import file_sha256
from tutelage.teachers.cache.shard import ShardFile, ShardWriter

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

    from tutelage.config.teacher_config import TeachConfig
    from tutelage.progress import Progress
    from tutelage.teachers.cache.job import CacheJob, CachePlan
    from tutelage.teachers.cache.layout import CacheManifest
    from tutelage.teachers.cache.shard import Packed

_POLL_SECONDS = 0.5
_MANIFEST_POLL_SECONDS = 0.02


def write_cache(config: TeachConfig, progress: Progress | None = None) -> Path:
    """Write the teacher cache of `config`, or what is missing of it.

    The same config always lands in the same directory. Several processes, on one machine or on several
    that share a file system, may be given the same config at the same time; each returns when the whole
    cache is finished. However often writers are killed, the bytes are those of an undisturbed one (up to
    the rounding of different hardware).

    Returns:
        The cache's directory.

    Raises:
        UserError: something in the input is wrong, or the disk is full; finished shards stay.
        Stopped: on a signal to stop, after the current batch; finished shards stay.
    """
    progress = progress or NullProgress()
    plan = plan_cache(config)
    if _is_finished(plan):
        remove_stale_files(plan.path)
        progress.note(f"{plan.path} is finished; nothing to do")
        return plan.path
    if warning := memory_warning(plan):
        progress.note(f"warning: {warning}")
    job = load_job(plan)
    for note in job.teacher.notes:
        progress.note(note)
    make_directory(config.output)
    with stop_signal() as stop, ThreadPoolExecutor(1, thread_name_prefix="encoder") as encoder:
        index = ShardIndex(plan.path, job.manifest)
        positions = job.manifest.layout.positions
        _check_space(job, positions - index.tokens)
        make_directory(plan.path / "shards")
        _write_manifest(job, stop)
        if index.tokens:
            progress.note(f"resuming after {index.tokens:,} of {positions:,} tokens")
        progress.start(plan.path.name, positions, "tokens", index.tokens)
        writer = _Writer(job, index, progress, stop, encoder)
        while missing := index.missing():
            written = [writer.try_write(shard) for shard in missing]
            if not any(written) and stop.wait(_POLL_SECONDS):  # other processes hold all that is left
                raise Stopped
            index.refresh()
            if index.tokens:  # of others too
                writer.report(index.tokens, index.bytes)
    progress.finish(plan.path.name)
    remove_stale_files(plan.path)
    return plan.path


def _is_finished(plan: CachePlan) -> bool:
    """Whether the cache is there, by its manifest, head and the indexes of its shards.

    Raises:
        UserError: there is one of other content.
    """
    try:
        manifest = read_cache_manifest(plan.path)
    except UserError:
        return False
    if manifest.fingerprint != plan.fingerprint:
        raise _of_other_content(plan.path)
    has_head = manifest.head_sha256 in (None, file_sha256(plan.path / HEAD_FILE))
    return has_head and not ShardIndex(plan.path, manifest).missing()


def _of_other_content(path: Path) -> UserError:
    return UserError(
        f"{path}: holds a teacher cache of other content, which was put there; move it away or delete it, "
        "or choose another name or output"
    )


def _check_space(job: CacheJob, tokens: int) -> None:
    """Refuse early what does not fit; what compression may save is not known yet."""
    needed = tokens * job.bytes_per_token + job.head_bytes
    free = free_bytes(job.plan.path)
    if needed > free:
        raise DiskError(
            f"{job.plan.path}: the cache needs about {size_text(needed)} more, free are {size_text(free)}; "
            "free some and run the same command, or choose another output or a smaller format (`tutelage "
            "teach --estimate` compares them)"
        )


def _write_manifest(job: CacheJob, stop: threading.Event) -> None:
    """Write the manifest unless it exists, and before it the head where hidden states need one.

    Raises:
        UserError: the directory holds another cache, or its manifest is damaged.
    """
    path, manifest = job.plan.path, job.manifest
    held = lock_when_free(
        path / "shards" / "manifest.lock", str(path), lambda: stop.wait(_MANIFEST_POLL_SECONDS)
    )
    with held:
        for name in (MANIFEST_FILE, HEAD_FILE):
            _remove_leftovers(path / name)
        known = read_cache_manifest(path) if (path / MANIFEST_FILE).exists() else manifest
        if known.fingerprint != manifest.fingerprint or known.layout != manifest.layout:
            raise _of_other_content(path)
        sha256 = known.head_sha256
        if manifest.format.kind == "hidden" and (sha256 is None or file_sha256(path / HEAD_FILE) != sha256):
            with atomic_write(path / HEAD_FILE) as partial:
                save_file({name: x.detach().cpu().contiguous() for name, x in job.head.items()}, partial)
                partial.chmod(path.stat().st_mode & 0o666)  # safetensors keeps files to their owner
            sha256 = file_sha256(path / HEAD_FILE)
        if known is manifest or sha256 != known.head_sha256:
            manifest = known.model_copy(update={"head_sha256": sha256})
            write_manifest_file(path, manifest)


class ShardIndex:
    """The finished shards of a cache, read off its directory.

    A shard appears under its name only when it is complete, whichever process wrote it.

    Attributes:
        tokens: positions of the finished shards.
        bytes: their size.
    """

    def __init__(self, cache: Path, manifest: CacheManifest) -> None:
        self.tokens = self.bytes = 0
        self._cache = cache
        self._manifest = manifest
        self._finished: set[int] = set()
        self.refresh()

    def missing(self) -> list[int]:
        """Shards that are not known to be finished."""
        return [shard for shard in range(self._manifest.layout.shards) if shard not in self._finished]

    def is_finished(self, shard: int) -> bool:
        """Look whether a shard is finished now. A damaged one is not."""
        try:
            file = ShardFile(self._cache, self._manifest, shard)
            file.check_index()
        except UserError:
            return False
        if shard not in self._finished:
            self._finished.add(shard)
            self.tokens += len(self._manifest.layout.positions_of(shard))
            self.bytes += file.bytes
        return True

    def refresh(self) -> None:
        """Look for shards that other processes have finished."""
        present = {path.name for path in (self._cache / "shards").glob("*.bin")}
        for shard in self.missing():
            if self.file(shard).name in present:
                self.is_finished(shard)

    def file(self, shard: int) -> Path:
        """Where a shard lies."""
        return self._cache / self._manifest.layout.file(shard)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes shards. The codec works in a thread of its own while the teacher computes the next batch."""

    job: CacheJob
    index: ShardIndex
    progress: Progress
    stop: threading.Event
    encoder: ThreadPoolExecutor

    def try_write(self, shard: int) -> bool:
        """Write a shard unless it is finished; False if another process is writing it."""
        path = self.index.file(shard)
        try:
            with lock(path.with_suffix(".lock"), str(path)):
                if not self.index.is_finished(shard):
                    self._write(path, shard)
                    self.index.is_finished(shard)
        except LockedError:
            return False
        return True

    def _write(self, path: Path, shard: int) -> None:
        done, size = self.index.tokens, self.index.bytes
        _remove_leftovers(path)
        with atomic_write(path) as partial, partial.open("wb") as file:
            out = ShardWriter(file)
            for blocks, tokens in self._encoded(shard):
                for block in blocks:
                    out.add(block)
                done += tokens
                self.report(done, size + out.bytes)
            out.finish(self.job.manifest, shard)

    def report(self, done: int, size: int) -> None:
        """Tell how many positions of the cache are written, in how many bytes."""
        stage = self.job.plan.path.name
        self.progress.advance(stage, done)
        self.progress.describe(stage, {"bytes": size, "bytes_per_token": size / done})

    def _encoded(self, shard: int) -> Iterator[tuple[list[Packed], int]]:
        """The blocks of each batch of a shard, and their positions."""
        ahead: Future[tuple[list[Packed], int]] | None = None
        for batch in self.job.batches(shard):
            if self.stop.is_set():
                raise Stopped
            targets = self.job.targets(batch)
            before, ahead = ahead, self.encoder.submit(self.job.encoded, targets, batch)
            if before is not None:
                yield before.result()
        if ahead is not None:
            yield ahead.result()


def remove_stale_files(cache: Path) -> None:
    """Remove what killed writers left in a finished cache; a cache without leftovers is not touched."""
    if any(_leftovers(cache / name) for name in (MANIFEST_FILE, HEAD_FILE)):
        with contextlib.suppress(UserError), lock(cache / "shards" / "manifest.lock", str(cache)):
            for name in (MANIFEST_FILE, HEAD_FILE):
                _remove_leftovers(cache / name)
    for stale in (cache / "shards").glob("*.lock"):
        with contextlib.suppress(UserError), lock(stale, str(cache)):
            pass  # releasing it removes the file


def _leftovers(path: Path) -> list[Path]:
    """Temporary files of `path`: of killed writers, if the caller holds its lock."""
    return list(path.parent.glob(f".{path.name}.*"))


def _remove_leftovers(path: Path) -> None:
    for leftover in _leftovers(path):
        leftover.unlink(missing_ok=True)
