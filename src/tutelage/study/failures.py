"""Failed attempts at runs, and why: small files that outlive the runners."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tutelage.files import make_directory, write_json
from tutelage.study.records import Record, UnreadableError, read_model

if TYPE_CHECKING:
    from pathlib import Path


class Attempt(Record):
    """One failed attempt; `step` is that of the checkpoint it would have gone on from."""

    time: str
    host: str
    error: str
    step: int


class _Attempts(Record):
    attempts: list[Attempt]


class Failures:
    """The failed attempts of a study, in `queue/failures/<run>.json`.

    Only attempts without progress count: a run that gets further each time before its machine goes away is
    not broken.

    Args:
        directory: of the study.
        retries: further attempts after a failed one.
    """

    def __init__(self, directory: Path, retries: int) -> None:
        self._directory = directory / "queue" / "failures"
        self._retries = retries
        self._read: dict[str, tuple[int, list[Attempt]]] = {}

    def add(self, run: str, error: str, step: int) -> None:
        """Record a failed attempt at a run that the caller has claimed."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        attempt = Attempt(time=now, host=socket.gethostname(), error=error, step=step)
        path = make_directory(self._directory) / f"{run}.json"
        earlier = _attempts(path)
        write_json(path, {"attempts": [one.model_dump() for one in [*earlier, attempt]]})

    def attempted(self) -> set[str]:
        """Runs with a failed attempt."""
        self._look()
        return set(self._read)

    def marked(self) -> dict[str, str]:
        """Runs that have failed for good, and why the last attempt did."""
        self._look()
        return {
            run: attempts[-1].error
            for run, (_, attempts) in self._read.items()
            if sum(one.step == attempts[-1].step for one in attempts) > self._retries
        }

    def clear(self, run: str) -> bool:
        """Forget the attempts at a run; False if there are none."""
        path = self._directory / f"{run}.json"
        there = path.exists()
        path.unlink(missing_ok=True)
        return there

    def _look(self) -> None:
        found = {}
        for path in self._directory.glob("*.json"):
            try:
                stamp = path.stat().st_mtime_ns
            except FileNotFoundError:  # cleared just now
                continue
            known = self._read.get(path.stem)
            read = known if known is not None and known[0] == stamp else (stamp, _attempts(path))
            if read[1]:
                found[path.stem] = read
        self._read = found


def _attempts(path: Path) -> list[Attempt]:
    """A damaged file counts as no attempt."""
    try:
        return read_model(path, _Attempts).attempts
    except UnreadableError:
        return []
