"""Load what a command or a worker needs while the garbage collector rests.

Torch and transformers are 400,000 objects that stay for good. Looking for garbage among them takes a fifth of
the time that a process needs to begin, and once more a second when it ends.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTS_WHAT_IS_ALIVE = "triton._C.libtriton"
"""Loaded with torch from 2.15 on: from Triton 3.9 on, at the very end of a process, it prints 30 lines about
"leaked" types and functions of its own if Python has not taken everything down before it ends."""


@contextmanager
def loading() -> Iterator[None]:
    """Import torch inside; what has been loaded then is left alone by every later collection.

    Only the first time: what is garbage by then is left alone too.
    """
    end_soon()
    gc.disable()
    try:
        yield
    finally:
        _freeze_once()
        gc.enable()


@functools.cache
def end_soon() -> None:
    """Have this process end without a look for garbage in all it loaded, which takes a second."""
    atexit.register(_pass_over_everything)


def _pass_over_everything() -> None:
    gc.freeze()
    if _LISTS_WHAT_IS_ALIVE in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nothing is left to be said but that


@functools.cache
def _freeze_once() -> None:
    """Freeze, the first time; whether that was done, the number of frozen objects does not say.

    From Python 3.12 on some are frozen when a process begins.
    """
    gc.freeze()
