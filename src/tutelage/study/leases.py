"""Leases on runs and records of failed attempts, kept as files that runners on several machines share.

    queue/runners/<token>.json     a runner: host, process, and a heartbeat that it renews
    queue/runners/<token>.stop     that runner is asked to stop
    queue/leases/<run>.<n>.json    the n-th lease of a run; the one with the highest number counts
    queue/failures/<run>.json      failed attempts at a run

The one step that must be atomic is to create a file that must not exist yet: whoever creates lease n + 1
after lease n was released, or after its runner died, has the run, and nobody else can. A lease is never
removed, so a slow reader cannot mistake a new lease for an old one.

A runner is dead if its process is gone (seen from the same machine), or if its heartbeat stood still in
several readings in a row. Only the reader's own clock counts, so clocks may differ by any amount.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tutelage.errors import UserError
from tutelage.files import make_directory, write_json
from tutelage.records import Record, UnreadableError, read_model, sealed, write_sealed

if TYPE_CHECKING:
    from typing import Self


_FRESH_SECONDS = 60.0
_LEASE_NAME = re.compile(r"([^.].*)\.([0-9]{1,9})\.json")
"""<run>.<n>.json"""


class Attempt(Record):
    """One failed attempt.

    It would have resumed from the checkpoint of `step`; `shards` of caches were finished, if it needs one.
    """

    time: str
    host: str
    error: str
    step: int
    shards: int = 0


class _Attempts(Record):
    attempts: list[Attempt]


class Failures:
    """The failed attempts at a study's runs.

    Only attempts without progress count: a run that gets further each time before its machine goes away is
    not broken.

    Args:
        directory: of the study.
        retries: further attempts after a failed one.
    """

    def __init__(self, directory: Path, retries: int) -> None:
        self._directory = directory / "queue" / "failures"
        self._retries = retries

    def add(self, run: str, error: str, step: int, shards: int = 0) -> None:
        """Record a failed attempt at a run that the caller holds."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        attempt = Attempt(time=now, host=socket.gethostname(), error=error, step=step, shards=shards)
        self._write(run, [*_attempts(make_directory(self._directory) / f"{run}.json"), attempt])

    def attempted(self) -> set[str]:
        """Runs with a failed attempt."""
        return set(self._read())

    def marked(self) -> dict[str, str]:
        """Runs that have failed for good, and why the last attempt did."""
        return {
            run: attempts[-1].error
            for run, attempts in self._read().items()
            if (got := [(one.step, one.shards) for one in attempts]).count(got[-1]) > self._retries
        }

    def forgive(self) -> list[str]:
        """Let runs that have failed for good be tried once more, and return them.

        The other attempts stay, so that a run that took others with it is tried alone again.
        """
        attempts = self._read()
        runs = [run for run in self.marked() if run in attempts]
        for run in runs:
            if self._retries:
                self._write(run, attempts[run][-self._retries :])
            else:
                self.clear(run)
        return runs

    def clear(self, run: str) -> bool:
        """Forget the attempts at a run; False if it has none."""
        path = self._directory / f"{run}.json"
        if not path.is_file():
            return False
        path.unlink(missing_ok=True)
        return True

    def _write(self, run: str, attempts: list[Attempt]) -> None:
        write_sealed(self._directory / f"{run}.json", {"attempts": [one.model_dump() for one in attempts]})

    def _read(self) -> dict[str, list[Attempt]]:
        """The attempts at every run; the files are few, and their times may be too coarse to tell changes."""
        found = {path.stem: _attempts(path) for path in self._directory.glob("*.json")}
        return {run: attempts for run, attempts in found.items() if attempts}


def _attempts(path: Path) -> list[Attempt]:
    """The attempts in a file; none if it is missing or damaged."""
    try:
        return read_model(path, _Attempts).attempts
    except UnreadableError:
        return []


LeaseState = Literal["free", "ours", "theirs", "done"]


class Runner(Record):
    """A runner's own record; `machine` is None where processes of others cannot be seen.

    `plan` is the digest of the plan that it works on, None while it prepares the study or waits to.
    """

    host: str
    machine: str | None
    pid: int
    beat: int
    time: float
    plan: str | None = None


class _Lease(Record):
    owner: str
    state: Literal["held", "released", "done"]
    recipe: str


@dataclass(slots=True)
class _Watch:
    """How often in a row a runner's heartbeat was found unchanged."""

    beat: int | None
    missed: int
    since: float


class Leases:
    """A runner's view of the leases of a study, and its own: a context manager, not entered to look only.

    Args:
        directory: of the study.
        beat_seconds: time between heartbeats.
        patience: heartbeats in a row that a runner may miss before its runs are taken over.

    Raises:
        UserError: an older version of tutelage wrote the study's queue.
    """

    def __init__(self, directory: Path, beat_seconds: float = 5.0, patience: int = 6) -> None:
        if (directory / "queue" / "claims").exists():
            raise UserError(
                f"{directory / 'queue'}: by an older version, whose runners this one cannot see; stop them, "
                "delete that directory and run the study again (finished runs are kept)"
            )
        self.token = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._directory = directory
        self._runners, self._leases = (directory / "queue" / name for name in ("runners", "leases"))
        self._beat_seconds, self._patience = beat_seconds, patience
        self._newest: dict[str, int] = {}
        self._read: dict[str, tuple[int, _Lease]] = {}
        self._watched: dict[str, _Watch] = {}
        self._dead: dict[str, bool] = {}
        self._beats = 0
        self._plan: str | None = None
        self._writing, self._leave = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        for place in (self._runners, self._leases):
            make_directory(place)
        self._write()
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._heart.join()
        for suffix in (".json", ".stop"):
            (self._runners / f"{self.token}{suffix}").unlink(missing_ok=True)

    def refresh(self) -> None:
        """Read what has changed on disk; the other methods answer from what this has read."""
        self._dead.clear()
        for entry in os.scandir(self._leases) if self._leases.is_dir() else ():
            if found := _LEASE_NAME.fullmatch(entry.name):  # others are being written, or are no leases
                self._newest[found[1]] = max(int(found[2]), self._newest.get(found[1], 0))
        for run, number in self._newest.items():
            known = self._read.get(run)
            if known is None or known[0] != number or known[1].state == "held":
                self._read[run] = number, self._lease(run, number)

    def state(self, run: str, recipe: str) -> LeaseState:
        """Who holds `run`; "done": it was finished with this `recipe`."""
        if run not in self._read:
            return "free"
        lease = self._read[run][1]
        if lease.state == "done" and lease.recipe == recipe:
            return "done"
        if lease.state != "held":
            return "free"
        if lease.owner == self.token:
            return "ours"
        return "free" if self._is_dead(lease.owner) else "theirs"

    def holder(self, run: str) -> str | None:
        """Token of the runner, dead or alive, that was the last to take `run` and has not given it back."""
        _, lease = self._read.get(run, (0, None))
        return None if lease is None or lease.state != "held" else lease.owner

    def owner(self, run: str) -> str | None:
        """Host and process of the runner that holds `run`; None if none does, as far as can be seen."""
        token = self.holder(run)
        runner = None if token is None else read_runner(self._record(token))
        return None if runner is None or is_gone(runner) else f"{runner.host} process {runner.pid}"

    def others(self) -> dict[str, Runner]:
        """Other runners that seem to live, by token: their heartbeats are about as new as ours.

        The file system says how new both are, whose clock is the same for all.
        """
        now = self._record(self.token).stat().st_mtime
        found = {}
        for token, runner in living_runners(self._directory).items():
            with contextlib.suppress(FileNotFoundError):  # it has ended just now
                if token != self.token and now - self._record(token).stat().st_mtime < _FRESH_SECONDS:
                    found[token] = runner
        return found

    def others_at_work(self) -> bool:
        """Whether another runner that seems to live holds a run."""
        holders = {lease.owner for _, lease in self._read.values() if lease.state == "held"}
        return not holders.isdisjoint(self.others())

    def acquire(self, run: str, recipe: str) -> bool:
        """Take a free run; False if another runner was faster. Raises `UserError` as `check_place`."""
        number = self._newest.get(run, 0) + 1
        lease = _Lease(owner=self.token, state="held", recipe=recipe)
        try:
            with self._path(run, number).open("x", encoding="utf-8") as file:
                file.write(sealed(lease.model_dump()))
        except FileExistsError:
            return False
        except FileNotFoundError:
            self.check_place()
            raise
        self._newest[run] = number
        self._read[run] = number, lease
        return True

    def release(self, run: str, *, done: bool) -> None:
        """End a lease of ours: the run is finished, or free again."""
        number, lease = self._read[run]
        ended = lease.model_copy(update={"state": "done" if done else "released"})
        write_sealed(self._path(run, number), ended.model_dump())
        self._read[run] = number, ended

    def check_place(self) -> None:
        """Raise `UserError` if the study's directory is no longer where it was when this was entered."""
        if not self._leases.is_dir():
            raise UserError(
                f"{self._directory}: has vanished while the study ran; if it was moved, move it back or give "
                "its new place as --output, and the same command goes on"
            )

    def work_on(self, plan: str) -> None:
        """Let others know the digest of the plan that this runner works on from now on."""
        self._plan = plan
        self._write()

    def is_asked_to_stop(self) -> bool:
        """Whether `tutelage study stop` wants this runner to end."""
        return (self._runners / f"{self.token}.stop").exists()

    def _beat(self) -> None:
        while not self._leave.wait(self._beat_seconds):
            self._beats += 1
            with contextlib.suppress(UserError, OSError):  # a full disk: others take over if it stays so
                self._write()

    def _write(self) -> None:
        with self._writing:  # the newest record is the last to be written
            runner = Runner(
                host=socket.gethostname(),
                machine=_machine(),
                pid=os.getpid(),
                beat=self._beats,
                time=time.time(),
                plan=self._plan,
            )
            write_sealed(self._record(self.token), runner.model_dump())

    def _record(self, token: str) -> Path:
        return self._runners / f"{token}.json"

    def _path(self, run: str, number: int) -> Path:
        return self._leases / f"{run}.{number}.json"

    def _lease(self, run: str, number: int) -> _Lease:
        """A lease as it is on disk; one that is being written just now is held by an unknown runner."""
        path = self._path(run, number)
        try:
            return read_model(path, _Lease)
        except UnreadableError:
            return _Lease(owner=path.name, state="held", recipe="")

    def _is_dead(self, owner: str) -> bool:
        """Whether a runner's process is gone or too many of its heartbeats were missed; once a reading."""
        if owner in self._dead:
            return self._dead[owner]
        runner = read_runner(self._record(owner))
        beat, now = None if runner is None else runner.beat, time.monotonic()
        watch = self._watched.setdefault(owner, _Watch(beat, 0, now))
        if watch.beat != beat:
            watch.beat, watch.missed, watch.since = beat, 0, now
        elif now - watch.since >= self._beat_seconds:  # one miss a reading: our pause is no miss of theirs
            watch.missed, watch.since = watch.missed + 1, now
        gone = runner is not None and is_gone(runner)
        self._dead[owner] = gone or watch.missed >= self._patience
        return self._dead[owner]


def runners(directory: Path) -> dict[str, Runner]:
    """The runners of a study that have not ended by themselves, by token; dead ones are among them."""
    found = {
        path.stem: read_runner(path) for path in sorted((directory / "queue" / "runners").glob("*.json"))
    }
    return {token: runner for token, runner in found.items() if runner is not None}


def living_runners(directory: Path) -> dict[str, Runner]:
    """The runners of a study whose process is not known to have ended, by token."""
    return {token: runner for token, runner in runners(directory).items() if not is_gone(runner)}


def is_silent(runner: Runner) -> bool:
    """Whether the last heartbeat is more than a minute old by our clock, which may be off from theirs."""
    return time.time() - runner.time >= _FRESH_SECONDS


def ask_to_stop(directory: Path, token: str) -> None:
    """Ask a runner to checkpoint its runs and end."""
    write_json(directory / "queue" / "runners" / f"{token}.stop", {"time": time.time()})


def read_runner(path: Path) -> Runner | None:
    """A runner's record; None if there is none, or none that can be read."""
    try:
        return read_model(path, Runner)
    except UnreadableError:
        return None


def is_gone(runner: Runner) -> bool:
    """Whether the process is known to have ended; False also where that cannot be seen."""
    if runner.machine is None or runner.machine != _machine():
        return False
    try:
        os.kill(runner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists, and is another user's
        pass
    return False


def _machine() -> str | None:
    """This boot of this machine and its process numbers (containers have their own); None: not on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
