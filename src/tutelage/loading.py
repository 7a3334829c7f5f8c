"""Load what a command or a worker needs while the garbage collector rests.

Torch and transformers are 400,000 objects that stay for good. Looking for garbage among them takes a fifth of
the time that a process needs to begin, and once more a second when it ends.
"""

from __future__ import annotations

import functools
import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def loading() -> Iterator[None]:
    """Import torch inside; what has been loaded then is left alone by every later collection.

    Only the first time: what is garbage by then is left alone too.
    """
    gc.disable()
    try:
        yield
    finally:
        _freeze_once()
        gc.enable()


@functools.cache
def _freeze_once() -> None:
    """Freeze, the first time; whether that was done, the number of frozen objects does not say.

    From Python 3.12 on some are frozen when a process begins.
    """
    gc.freeze()
