"""Stop on Ctrl-C, SIGTERM and SIGHUP: between two steps of work, or at once where nothing is half done.

A signal that is ignored when the process starts, as `nohup` has SIGHUP ignored, stays so.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

_OF_TERMINALS = [signal.SIGINT]
if sys.platform != "win32":
    _OF_TERMINALS.append(signal.SIGHUP)  # it was closed
_SIGNALS = [*_OF_TERMINALS, signal.SIGTERM]
_AGAIN_SECONDS = 0.01
_NOTED = threading.Event()
_DEAF_SECONDS = 1.0
"""How long the handlers have before a call that keeps Python from running them counts as stuck."""

EXIT_CODE = 130
"""Exit code of a process that was stopped."""


def last_line(where: str = "") -> str:
    """What is printed when a command was stopped, after "step 12 of 100" for example."""
    return f"\nstopped{f' {where}'.rstrip()}; run the same command again to resume\n"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt, so that it cleans up.

    One that comes while an object is deleted is lost to Python, which ignores what is raised there; it is
    raised again a moment later. So is one that comes while Python hears of that.
    """
    here = threading.get_ident()
    last: list[int] = []
    again: list[threading.Timer] = []

    def raise_again() -> None:
        again.append(threading.Timer(_AGAIN_SECONDS, _send, (here, *last)))
        again[-1].start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        last[:] = [number]
        if _runs(ignored.__code__, frame):
            raise_again()
        else:
            raise KeyboardInterrupt

    def ignored(found: sys.UnraisableHookArgs) -> None:
        if last and issubclass(found.exc_type, KeyboardInterrupt):
            raise_again()
        else:
            hook(found)

    hook = sys.unraisablehook
    with _handled(interrupt):
        sys.unraisablehook = ignored
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for timer in again:  # none of them is to reach what comes after the block
                timer.cancel()
                timer.join()


def _runs(code: CodeType, frame: FrameType | None) -> bool:
    """Whether a function runs in a frame or was on the way to it."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def came_of_signal(error: BaseException | None) -> bool:
    """Whether somebody has made the error of the KeyboardInterrupt of a signal.

    Python 3.11 does while a class is made, so while anything is imported. What fails in cleaning up after a
    signal is an error of its own.
    """
    while error is not None:
        if isinstance(error.__cause__, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Yield an event that the signals set, for work that ends where it can be resumed."""
    event = threading.Event()

    def note(*_: object) -> None:
        event.set()
        _NOTED.set()

    with _handled(note):
        yield event


def was_asked_to_stop() -> bool:
    """Whether a signal ever came to a `stop_signal`, also to one that is over and had no use for it."""
    return _NOTED.is_set()


@contextlib.contextmanager
def ended_in_waits(line: str) -> Iterator[None]:
    """Let a signal that Python handles end the process, if a call that Python cannot interrupt goes on.

    For calls of a library that wait for other processes, with nothing half done: for want of one of them they
    can take minutes to return, and handlers run only then.

    Args:
        line: printed at such an end.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers are another's
        yield
        return
    over = threading.Event()
    ear, mouth = socket.socketpair()
    with ear, mouth:
        mouth.setblocking(False)
        watch = threading.Thread(target=_watch, args=(ear, over, line), daemon=True)
        watch.start()
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            over.set()
            mouth.shutdown(socket.SHUT_WR)
            watch.join()


def _watch(ear: socket.socket, over: threading.Event, line: str) -> None:
    """End the process a moment after a signal came, unless `over` is set; what comes is its number."""
    while heard := ear.recv(1):
        if heard[0] in _SIGNALS and not over.wait(_DEAF_SECONDS):
            with contextlib.suppress(OSError):  # nobody reads it, or its disk is full
                sys.stderr.write(line)
                sys.stderr.flush()
            os._exit(EXIT_CODE)


def _send(thread: int, number: int) -> None:
    """Send the main thread a signal, which ends what it waits for too."""
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(thread, number)


def leave_signals_to_parent() -> None:
    """Ignore what a terminal sends to all of its processes, in one whose parent says when it is to stop."""
    for number in _OF_TERMINALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back what a terminal sends until the block ends; a process that is started in it never gets it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle the signals while the block runs. Outside the main thread they are left to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
