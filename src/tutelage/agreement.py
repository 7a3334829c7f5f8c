"""Agree among the processes of a job: what is wrong on one ends all, in one line, and all run the same thing.

Words are exchanged as JSON through the store that torchrun keeps, which needs no process group and no device.
A process alone agrees with itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import threading
import time
import uuid
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tutelage import processes
from tutelage.errors import DiskError, Stopped, UserError, one_line
from tutelage.files import LockedError
from tutelage.stopping import ended_in_waits, last_line, was_asked_to_stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch._C._distributed_c10d import Store

    from tutelage.processes import Place

DEFAULT_SECONDS = 600
"""How long a process waits for the others where no `parallel.timeout` is known yet."""

_FAILED_SECONDS = 20.0
"""How long one that failed waits: the others may be busy for longer, or wait for it elsewhere."""

_LOST_SECONDS = 6.0
"""How long a process that lost another waits for the launcher to end it, or for the other's last words."""

_PRINT_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_POLL_SECONDS = 0.05
_MEETINGS = itertools.count()
_Word = dict[str, Any]


@contextlib.contextmanager
def together(seconds: int = DEFAULT_SECONDS) -> Iterator[dict[str, object]]:
    """Do the block on every process and wait for all at its end; if it fails on one, it fails on all.

    Args:
        seconds: how long to wait for the others.

    Yields:
        A dictionary for what must be the same on all processes, by name; compared at the end.

    Raises:
        UserError: of whichever process raised one; the message names the rank if others did not. It is
            `shared`.
        Stopped: one process was stopped.
    """
    facts: dict[str, object] = {}
    place = processes.place()
    if place.size == 1:
        yield facts
        return
    error: Exception | None = None
    try:
        yield facts
    except Exception as caught:  # noqa: BLE001 - raised again once the others know
        error = caught
    said = {"kind": _kind(error), "text": _text(error), "facts": facts}
    try:
        verdict = _meet(place, said, _FAILED_SECONDS if error is not None else seconds)
    except UserError:
        if error is not None:
            raise error from None
        raise
    if verdict["kind"] == "":
        return
    if error is not None and verdict["kind"] == "bug" and said["kind"] == "bug":
        raise error
    if verdict["kind"] == "stopped":
        raise Stopped
    shared = _SHARED.get(verdict["kind"], UserError)(verdict["text"])
    shared.shared = True
    raise shared from error


def waiting_for_others() -> contextlib.AbstractContextManager[None]:
    """Let a signal to stop end this process though torch waits for the others, one of which may be dead."""
    return ended_in_waits(last_line() if processes.place().is_main else "")


def last_words(error: Exception) -> str | None:
    """Say to the other processes that this one ends with `error`; they lose it in a moment.

    Returns:
        The line to print; None if another process has said what is wrong, and this one only lost it, or if
        whoever started them ends them.
    """
    try:
        place = processes.place()
    except UserError:  # it is about the variables that say it
        return str(error)
    if place.size == 1 or (place.is_main and isinstance(error, UserError) and error.shared):
        return str(error)
    if isinstance(error, UserError) and error.shared:
        time.sleep(_PRINT_SECONDS)  # the launcher ends all as soon as one has ended
        return None
    if lost_at_a_stop(error):
        return None
    lost = is_loss(error)
    if lost:
        time.sleep(_LOST_SECONDS)
    first = str(place.rank)
    if meeting_place.cache_info().currsize:  # one that never found the others does not look for them again
        say = functools.partial(meeting_place().compare_set, "failed", "", first)
        with contextlib.suppress(Exception):  # the store may be gone as well
            first = _within(_LOST_SECONDS, say).decode()
    if first != str(place.rank):
        return None
    said = f"lost another process ({one_line(error, 120)})" if lost else _text(error)
    return f"rank {place.rank}: {said}"


def lost_at_a_stop(error: Exception) -> bool:
    """Whether another process was lost while all were asked to stop, which a launcher asks when one has died.

    The signal may have come while what was open was closed, where none ends the process.
    """
    return was_asked_to_stop() and is_loss(error)


def is_loss(error: Exception) -> bool:
    """Whether a message could not be exchanged with another process."""
    from torch.distributed import DistError  # noqa: PLC0415 - torch is there, for several processes

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


_SHARED: dict[str, type[UserError]] = {"busy": LockedError, "disk": DiskError}
"""Errors that are more than wrong input, by what processes call them."""


def _kind(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, Stopped):
        return "stopped"
    for kind, of_kind in _SHARED.items():
        if isinstance(error, of_kind):
            return kind
    return "user" if isinstance(error, UserError) else "bug"


def _text(error: Exception | None) -> str:
    if error is None or isinstance(error, UserError):
        return str(error or "")
    return f"{type(error).__name__}: {one_line(error)}"


def _meet(place: Place, said: _Word, seconds: float) -> _Word:
    """Exchange words: the first process reads all and judges, the others read its verdict."""
    store, meeting = meeting_place(), next(_MEETINGS)
    store.set(f"{meeting}/{place.rank}", json.dumps(said, default=str))
    if not place.is_main:
        verdict = _read(store, f"{meeting}/verdict", 0, seconds, seconds)
        store.set(f"{meeting}/read/{place.rank}", "")
        return verdict
    deadline = time.monotonic() + seconds
    words = [
        _read(store, f"{meeting}/{rank}", rank, deadline - time.monotonic(), seconds)
        for rank in range(place.size)
    ]
    kind, text = _judge(words)
    store.set(f"{meeting}/verdict", json.dumps({"kind": kind, "text": text}))
    # The store may end with this process, so it stays until the others have read that; one may have died.
    heard = [f"{meeting}/read/{rank}" for rank in range(1, place.size)]
    deadline = time.monotonic() + _LOST_SECONDS
    while not store.check(heard) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return {"kind": kind, "text": text}


def _read(store: Store, key: str, rank: int, left: float, seconds: float) -> _Word:
    """What a process said, which may take it until `left` of the `seconds` are over."""
    from torch.distributed import DistError  # noqa: PLC0415 - as above

    deadline = time.monotonic() + left

    def wait() -> bytes:
        pause = _POLL_SECONDS
        # Not by the store's own wait, in which a process sees no signal.
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS)
        return store.get(key) if store.check([key]) else b""

    reason = "timeout"
    try:
        if said := _within(left + _LOST_SECONDS, wait):
            word: _Word = json.loads(said)
            return word
    except TimeoutError:
        reason = "the process that all write to is stopped or out of reach"
    except (DistError, RuntimeError) as error:
        reason = one_line(error, 120)
    raise UserError(
        f"rank {rank} did not answer within {seconds:.0f} seconds (parallel.timeout), or has ended: {reason}"
    )


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """Return what a call to the store does, made in a thread: it has no end where the store is out of reach.

    Raises:
        TimeoutError: it takes longer.
    """
    answer: Future[bytes] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(timeout=seconds)


def _judge(words: list[_Word]) -> tuple[str, str]:
    """The kind of the worst error and its line; two empty texts if there is none and all facts agree."""
    for kind in ("bug", "user", *_SHARED, "stopped"):
        ranks = [rank for rank, word in enumerate(words) if word["kind"] == kind]
        if ranks:
            text = words[ranks[0]]["text"]
            alike = sum(word["text"] == text for word in words) == len(words)
            return kind, text if alike else f"rank {ranks[0]}: {text}"
    first: Mapping[str, object] = words[0]["facts"]
    for rank, word in enumerate(words):
        for name in {**first, **word["facts"]}:
            ours, theirs = first.get(name), word["facts"].get(name)
            if ours != theirs:
                return "user", (
                    f"{name} is {ours} on rank 0 and {theirs} on rank {rank}; start all processes with the "
                    "same files, code and packages"
                )
    return "", ""


@functools.cache
def meeting_place() -> Store:
    """The store of this start of this job, for several processes; connected once.

    torchrun restarts processes on the store that the last ones left their words in, so the first process
    names each start anew.

    Raises:
        UserError: the others are not found.
    """
    from torch._C._distributed_c10d import PrefixStore  # noqa: PLC0415 - as above
    from torch.distributed import DistError  # noqa: PLC0415 - as above
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415 - as above

    place = processes.place()
    try:
        with waiting_for_others():
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=DEFAULT_SECONDS)))
        store = PrefixStore("tutelage", store)
        name = _call_all(store, place) if place.is_main else _answer(store, place)
    except (DistError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"the other processes of {place.size} were not found ({' '.join(str(error).split()):.200}): all "
            f"must start within {DEFAULT_SECONDS} seconds, with a MASTER_PORT that nothing else uses"
        ) from None
    return PrefixStore(name, store)


def _call_all(store: Store, place: Place) -> str:
    """Tell each process the name of this start, in answer to what it wrote at its own start."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + DEFAULT_SECONDS
    missing, answered = set(range(1, place.size)), dict.fromkeys(range(place.size), "")
    while missing:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                hello = store.get(f"hello/{rank}").decode()
                if hello != answered[rank]:
                    store.set(f"answer/{rank}", f"{hello} {name}")
                    answered[rank] = hello
        missing -= {rank for rank in missing if store.check([f"{name}/came/{rank}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {', '.join(map(str, sorted(missing)))} are missing")
        time.sleep(_POLL_SECONDS)
    return name


def _answer(store: Store, place: Place) -> str:
    """Wait for the name of this start, given in answer to this process and to no earlier one."""
    hello, deadline = uuid.uuid4().hex, time.monotonic() + DEFAULT_SECONDS
    store.set(f"hello/{place.rank}", hello)
    while True:
        if store.check([f"answer/{place.rank}"]):
            theirs, _, name = store.get(f"answer/{place.rank}").decode().partition(" ")
            if theirs == hello:
                store.set(f"{name}/came/{place.rank}", "")
                return name
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 is missing")
        time.sleep(_POLL_SECONDS)
