"""Writing a teacher cache, by one process or many, from the beginning or from wherever it was left."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from tutelage.errors import Stopped, UserError
from tutelage.files import LockedError, make_directory, stop_signal
from tutelage.teachers.cache.job import make_plan, prepare
from tutelage.teachers.cache.reader import open_cache
from tutelage.teachers.cache.shard import ShardWriter, packed
from tutelage.teachers.cache.shard_index import Ledger, tidy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tutelage.config.teacher_config import TeachConfig
    from tutelage.teachers.cache.job import Job
    from tutelage.teachers.cache.shard import Packed
    from tutelage.types import Batch, DenseTargets

_POLL_SECONDS = 0.5
_PUBLISH_SECONDS = 1.0
"""Between manifests. They tell people how far it is; writers look at the shards themselves."""


class TeachWatcher(Protocol):
    """Whoever looks on while a cache is written: a progress bar, nobody."""

    def begin(self, cache: str, done: int, tokens: int) -> None:
        """The cache is begun (or gone on with) after `done` of `tokens` positions."""

    def advance(self, done: int, size: int) -> None:
        """`done` positions are there, by whichever process, in `size` bytes."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Unwatched:
    """The watcher of a cache that nobody looks at."""

    def begin(self, cache: str, done: int, tokens: int) -> None:
        """Do nothing."""

    def advance(self, done: int, size: int) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def write_cache(config: TeachConfig, watcher: TeachWatcher | None = None) -> Path:
    """Write the teacher cache of `config`, or what is left of it.

    The same config always lands in the same directory. Several processes, on one machine or on several
    that share a file system, may be given the same config at the same time; each returns when the whole
    cache is there. However often writers are killed, the bytes are those of an undisturbed one (up to
    the rounding of different hardware).

    Returns:
        The cache's directory.

    Raises:
        UserError: something in the input is wrong, or the disk is full; finished shards stay.
        Stopped: on SIGINT or SIGTERM, after the current batch; finished shards stay.
    """
    watcher = watcher or Unwatched()
    plan = make_plan(config)
    if _is_finished(plan.path):
        tidy(plan.path, threading.Event())
        watcher.note(f"{plan.path} is finished; nothing to do")
        return plan.path
    job = prepare(plan)
    for note in job.teacher.notes:
        watcher.note(note)
    make_directory(plan.path / "shards")
    with stop_signal() as stop, ThreadPoolExecutor(1, thread_name_prefix="encoder") as encoder:
        ledger = Ledger(job, stop)
        layout = job.manifest.layout
        _check_space(job, layout.positions - ledger.tokens)
        ledger.start()
        watcher.begin(plan.path.name, ledger.tokens, layout.positions)
        writer = _Writer(job, ledger, watcher, stop, encoder)
        while missing := ledger.missing():
            did = [writer.did(shard) for shard in missing]
            ledger.publish(_PUBLISH_SECONDS)
            if not any(did) and stop.wait(_POLL_SECONDS):  # other processes hold all that is left
                raise Stopped
            ledger.refresh()
        ledger.publish()
        tidy(plan.path, stop)
    return plan.path


class _Writer:
    """Writes shards. The codec works in a thread of its own while the teacher computes the next batch."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        watcher: TeachWatcher,
        stop: threading.Event,
        encoder: ThreadPoolExecutor,
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._watcher = watcher
        self._stop = stop
        self._encoder = encoder

    def did(self, shard: int) -> bool:
        """Write a shard unless it is there; False if another process is at it."""
        try:
            with self._ledger.lock(shard):
                if not self._ledger.look(shard):
                    self._write(shard)
                    self._ledger.look(shard)
        except LockedError:
            return False
        self._ledger.publish(_PUBLISH_SECONDS)
        return True

    def _write(self, shard: int) -> None:
        done, size = self._ledger.tokens, self._ledger.bytes
        with self._ledger.new_shard(shard) as partial, partial.open("wb") as file:
            out = ShardWriter(file)
            for blocks, tokens in self._encoded(shard):
                for block in blocks:
                    out.add(block)
                done += tokens
                self._watcher.advance(done, size + out.bytes)
            out.finish()

    def _encoded(self, shard: int) -> Iterator[tuple[list[Packed], int]]:
        """The blocks of each batch of a shard, and their positions."""
        ahead: Future[tuple[list[Packed], int]] | None = None
        for batch in self._job.batches(shard):
            if self._stop.is_set():
                raise Stopped
            targets = self._job.targets(batch)
            before, ahead = ahead, self._encoder.submit(encoded, self._job, targets, batch)
            if before is not None:
                yield before.result()
        if ahead is not None:
            yield ahead.result()


def encoded(job: Job, targets: DenseTargets, batch: Batch) -> tuple[list[Packed], int]:
    """A batch's blocks as they are stored, and its positions."""
    labels_N = batch.labels_BT.flatten()
    blocks = job.codec.encode(targets, labels_N, batch.starts[0], batch.tokens_BT.shape[1])
    return [packed(block, compress=job.manifest.compress) for block in blocks], len(labels_N)


def _is_finished(path: Path) -> bool:
    try:
        open_cache(path).check_head()
    except UserError:
        return False
    return True


def _check_space(job: Job, tokens: int) -> None:
    """Refuse early what does not fit; compression may save some, but nobody knows how much."""
    needed = tokens * job.bytes_per_token + job.head_bytes
    free = shutil.disk_usage(job.plan.path).free
    if needed > free:
        raise UserError(
            f"{job.plan.path}: the cache needs about {needed / 1e6:,.1f} MB more, free are "
            f"{free / 1e6:,.1f} MB; choose another output or a smaller format (--estimate compares them)"
        )
