"""Read from the Hugging Face Hub, or say within seconds and in one line that it cannot be reached.

Left to themselves the libraries try again for half a minute, and speak of caches and snapshots.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from typing import TYPE_CHECKING

from tutelage.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS = 4.0
"""How long the Hub may take to answer at all."""
_ASK_AGAIN = 60
"""Seconds after which it is asked again whether it answers."""


@contextlib.contextmanager
def reading_hub(
    what: str,
    instead: str = "give the path of a local directory",
    *,
    explains: bool = True,
    kept: bool = True,
) -> Iterator[None]:
    """Let a block read from the Hub; where that does not answer, it gets what was downloaded before.

    Args:
        what: begins every message: the setting and the name that was not found on this machine.
        instead: what else would do.
        explains: put in one line what a Hub that does answer says, too; else its error goes on.
        kept: what is read stays among the downloads, from which it can be copied; a stream does not.

    Raises:
        UserError: the Hub cannot be reached and what is wanted was not downloaded before; or it was reached,
            and has no such thing or does not give it.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only for what is not on this machine
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - as above

    if constants.is_offline_mode():
        silence: str | None = "is not asked, since HF_HUB_OFFLINE is set (unset it to ask)"
    elif (reason := _no_answer(constants.ENDPOINT, int(time.monotonic()) // _ASK_AGAIN)) is not None:
        silence = f"cannot be reached ({constants.ENDPOINT}: {reason}; HF_ENDPOINT names a mirror)"
    else:
        silence = None
    try:
        with contextlib.nullcontext() if silence is None else _offline():
            yield
    except UserError:
        raise
    except Exception as error:
        answered = silence is None or isinstance(error, HFValidationError)  # of a name that it cannot have
        if answered and not explains:
            raise
        if answered:
            reason = one_line(error)
            raise UserError(f"{what}: not on this machine, and the Hub does not give it: {reason}") from None
        earlier = f" not among earlier downloads ({constants.HF_HUB_CACHE})," if kept else ""
        copy = ", or copy that cache from a machine that has it" if kept else ""
        raise UserError(
            f"{what}: not on this machine,{earlier} and the Hugging Face Hub {silence}; {instead}{copy}"
        ) from None


@functools.cache
def _no_answer(endpoint: str, _period: int) -> str | None:
    """Why the Hub does not answer, in a word or two; None if it does, whatever it says."""
    found: list[str | None] = []

    def ask() -> None:
        from huggingface_hub import get_session  # noqa: PLC0415 - as above

        try:
            get_session().head(endpoint, timeout=_SECONDS)
        except Exception as error:  # noqa: BLE001 - of the HTTP library, a proxy or the system
            found.append(type(error).__name__)
        else:
            found.append(None)

    # Names are looked up without a limit on time, hence the thread, which nobody waits for in the end.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return found[0] if found else f"no answer in {_SECONDS:g} s"


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have the libraries read their caches alone, as with HF_HUB_OFFLINE=1, which they read when imported."""
    from huggingface_hub import constants  # noqa: PLC0415 - as above

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    if (datasets := sys.modules.get("datasets.config")) is not None:
        vars(datasets)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if (datasets := sys.modules.get("datasets.config")) is not None:
            vars(datasets)["HF_HUB_OFFLINE"] = before
