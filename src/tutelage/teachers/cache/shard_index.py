"""What of a cache is on disk, and the manifest that says so, while writers work on it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from tutelage.errors import Stopped, UserError
from tutelage.files import LockedError, atomic_write, lock, write_text
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import HEAD_FILE, file_sha256
from tutelage.teachers.cache.shard import shard_record

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

    from tutelage.teachers.cache.job import Job
    from tutelage.teachers.cache.layout import CacheManifest, ShardRecord

_MANIFEST = "manifest.json"
_WRITTEN_ALONE = (_MANIFEST, HEAD_FILE)
_POLL_SECONDS = 0.02


class Ledger:
    """The finished shards of a cache.

    A shard appears under its name only when it is complete, so the directory is the truth and the manifest
    follows it.

    Args:
        job: the cache; its directory exists.
        stop: set when waiting for another process must end.
    """

    def __init__(self, job: Job, stop: threading.Event) -> None:
        self.path = job.plan.path
        self._job = job
        self._stop = stop
        self._manifest = job.manifest
        self._records: dict[int, ShardRecord] = {}
        self._published = 0.0
        self.refresh()

    @property
    def tokens(self) -> int:
        """Positions of the finished shards."""
        return sum(record.tokens for record in self._records.values())

    @property
    def bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(record.bytes for record in self._records.values())

    def missing(self) -> list[int]:
        """Shards that nobody is known to have finished."""
        return [shard for shard in range(self._manifest.layout.shards) if shard not in self._records]

    def look(self, shard: int) -> bool:
        """Whether a shard is there now."""
        record = shard_record(self.path, self._manifest.layout, shard)
        if record is not None:
            self._records[shard] = record
        return record is not None

    def refresh(self) -> None:
        """Look for shards that other processes have finished."""
        present = {path.name for path in (self.path / "shards").iterdir()}
        for shard in self.missing():
            if self._file(shard).name in present:
                self.look(shard)

    def lock(self, shard: int) -> contextlib.AbstractContextManager[None]:
        """Hold a shard for this process. It may have been finished since: `look` before writing.

        Raises:
            LockedError: another process holds it.
        """
        return lock(self._file(shard).with_suffix(".lock"), str(self._file(shard)))

    @contextlib.contextmanager
    def new_shard(self, shard: int) -> Iterator[Path]:
        """Write a locked shard under a temporary name; it appears if the block succeeds."""
        path = self._file(shard)
        _remove_leftovers(path)
        with atomic_write(path) as partial:
            yield partial

    def start(self) -> None:
        """Write the manifest, and before it the head where hidden states need one.

        Raises:
            UserError: the directory holds another cache, or its manifest is damaged.
        """
        with _manifest_held(self.path, self._stop):
            self._manifest = _known_manifest(self._job)
            if self._manifest.format.kind == "hidden":
                self._manifest = self._manifest.model_copy(update={"head_sha256": self._head()})
            self._publish()

    def publish(self, every: float = 0.0) -> None:
        """Write the manifest with every shard that is there, unless that was under `every` seconds ago."""
        if time.monotonic() - self._published >= every:
            with _manifest_held(self.path, self._stop):
                self._publish()

    def _publish(self) -> None:
        self.refresh()
        shards = tuple(record for _, record in sorted(self._records.items()))
        write_text(self.path / _MANIFEST, self._manifest.model_copy(update={"shards": shards}).text())
        self._published = time.monotonic()

    def _head(self) -> str:
        """Write the teacher's head unless it is there; returns its checksum."""
        path, known = self.path / HEAD_FILE, self._manifest.head_sha256
        found = file_sha256(path)
        if found is not None and found == known:
            return found
        with atomic_write(path) as partial:
            save_file({name: x.detach().cpu().contiguous() for name, x in self._job.head.items()}, partial)
            partial.chmod(self.path.stat().st_mode & 0o666)  # safetensors keeps files to their owner
        written = file_sha256(path)
        assert written is not None  # noqa: S101 - just written
        return written

    def _file(self, shard: int) -> Path:
        return self.path / self._manifest.layout.file(shard)


def _known_manifest(job: Job) -> CacheManifest:
    """The manifest on disk, so that it stays as it was begun, or a new one."""
    path = job.plan.path
    if not (path / _MANIFEST).exists():
        return job.manifest
    known = read_cache_manifest(path)
    if known.fingerprint != job.manifest.fingerprint or known.layout != job.manifest.layout:
        raise UserError(f"{path}: holds a teacher cache of other content; choose another name or output")
    return known


def tidy(cache: Path, stop: threading.Event) -> None:
    """Remove what killed writers left in a finished cache."""
    claims = list((cache / "shards").glob("*.lock"))
    if claims or any(_leftovers(cache / name) for name in _WRITTEN_ALONE):
        with contextlib.suppress(UserError), _manifest_held(cache, stop):  # if they are ours to remove
            pass
        for claim in claims:
            with contextlib.suppress(UserError), lock(claim, str(cache)):
                pass


@contextlib.contextmanager
def _manifest_held(cache: Path, stop: threading.Event) -> Iterator[None]:
    """Be the only one to write manifest and head; the others wait, for it is quick."""
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(cache / "shards" / "manifest.lock", str(cache)))
                break
            except LockedError:
                if stop.wait(_POLL_SECONDS):
                    raise Stopped from None
        for name in _WRITTEN_ALONE:
            _remove_leftovers(cache / name)
        yield


def _leftovers(path: Path) -> list[Path]:
    """What killed writers of `path` left beside it; or a living one, if the caller does not hold it."""
    return list(path.parent.glob(f".{path.name}.*"))


def _remove_leftovers(path: Path) -> None:
    for leftover in _leftovers(path):
        leftover.unlink(missing_ok=True)
