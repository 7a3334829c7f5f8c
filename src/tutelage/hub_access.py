"""Read from the Hugging Face Hub, or say within seconds and in one line that it cannot be reached.

Left to themselves the libraries try again for half a minute, and speak of caches and snapshots.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_SECONDS = 4.0
"""How long the Hub may take to answer at all."""
_ASK_AGAIN = 60
"""Seconds after which it is asked again whether it answers."""
INSTEAD = "give the path of a local directory"
"""What else would do, wherever a name of the Hub may stand."""
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""Name of a file in the Hub's cache: its SHA-1 as git counts it; of a large file its SHA-256."""


@contextlib.contextmanager
def reading_hub(
    what: str,
    instead: str = INSTEAD,
    *,
    explains: bool = True,
    kept: bool = True,
) -> Iterator[bool]:
    """Let a block read from the Hub; where that does not answer, it gets what was downloaded before.

    The block is told whether the Hub answers; if not, and what is there is not enough, it raises something.

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
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415 - as above

    if constants.is_offline_mode():
        silence: str | None = "is not asked, since HF_HUB_OFFLINE is set (unset it to ask)"
    elif (reason := _no_answer(constants.ENDPOINT, int(time.monotonic()) // _ASK_AGAIN)) is not None:
        silence = f"cannot be reached ({constants.ENDPOINT}: {reason}; HF_ENDPOINT names a mirror)"
    else:
        silence = None
    try:
        with contextlib.nullcontext() if silence is None else _offline():
            yield silence is None
    except UserError:
        raise
    except Exception as error:
        answered = silence is None or isinstance(error, HFValidationError)  # of a name that it cannot have
        if answered and not explains:
            raise
        if answered:
            told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None  # such as a status
            reason = one_line(told if isinstance(told, Exception) else error)
            raise UserError(f"{what}: not on this machine, and the Hub does not give it: {reason}") from None
        earlier = f" not among earlier downloads ({constants.HF_HUB_CACHE})," if kept else ""
        copy = ", or copy that cache from a machine that has it" if kept else ""
        raise UserError(
            f"{what}: not on this machine,{earlier} and the Hugging Face Hub {silence}; {instead}{copy}"
        ) from None


def downloaded(
    what: str,
    name: str,
    revision: str | None,
    wanted: Sequence[str],
    is_enough: Callable[[Path], bool],
    instead: str = INSTEAD,
) -> Path:
    """Return the directory into which files of a repository were downloaded, now or before.

    Args:
        what: begins the message.
        name: of the repository.
        revision: commit or tag; None: the main branch.
        wanted: names or patterns of files.
        is_enough: whether the files in a directory will do.
        instead: what else would do, where the Hub is silent.

    Raises:
        UserError: as `reading_hub`, or a file is damaged.
    """
    from huggingface_hub import list_repo_files, snapshot_download  # noqa: PLC0415 - as above

    with reading_hub(what, instead) as answers:
        place = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
        if not is_enough(place) and not answers:
            raise FileNotFoundError
        if not is_enough(place):  # the library returns what is here, too, if the Hub answers with an error
            list_repo_files(name, revision=revision)
    check_downloads(name, sorted({file for pattern in wanted for file in place.glob(pattern)}))
    return place


def check_downloads(what: str, files: Iterable[Path]) -> None:
    """Compare downloaded files with the hashes that they have for names in the Hub's cache.

    The library compares lengths alone, and what it has once it takes for good.

    Args:
        what: begins the message.
        files: in a snapshot of the cache; those that are no links into it are passed over.

    Raises:
        UserError: one has other content.
    """
    for file in files:
        blob = file.resolve()
        if blob.parent.name != "blobs" or not _HASH.fullmatch(blob.name):
            continue
        state = blob.stat()
        if _hash(blob, state.st_size, state.st_mtime_ns) != blob.name:
            raise UserError(
                f"{what}: {file.name} is not what the Hub has, by its checksum: it came damaged, or was "
                f"damaged since; delete {blob}, and it is downloaded again"
            )


@contextlib.contextmanager
def checked_snapshot(what: str, snapshot: Path | None) -> Iterator[None]:
    """Check the configs and weights of a snapshot that a block loads; also if it cannot load them.

    Args:
        what: begins the message.
        snapshot: in the Hub's cache; its weights are downloaded by the block. None: nothing is checked.

    Raises:
        UserError: a file is damaged.
    """
    try:
        yield
    except Exception:
        check_downloads(what, _loaded(snapshot))
        raise
    check_downloads(what, _loaded(snapshot))


def _loaded(snapshot: Path | None) -> list[Path]:
    files = [] if snapshot is None else sorted(snapshot.iterdir())
    return [file for file in files if file.suffix in (".json", ".safetensors")]


@functools.cache
def _hash(blob: Path, size: int, _changed: int) -> str:
    """Compute what a file of the cache must be named, once for each file."""
    digest = hashlib.sha256()
    if len(blob.name) < len(digest.hexdigest()):
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with blob.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


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
