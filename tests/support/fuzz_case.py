"""Run one case of hostile input: it is used, or refused in one line, soon, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import signal
import traceback
from collections import Counter
from typing import TYPE_CHECKING

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS, CHARACTERS = 3, 800


class HangError(BaseException):
    """A case took more than `SECONDS` of this process's time."""


class Tried:
    """What became of the cases; `folder` is theirs, and `began` the memory before the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.began = peak()

    @contextlib.contextmanager
    def case(self, family: str, given: object, output: Path | None = None) -> Iterator[None]:
        """Run a case, which may refuse its input in one line; `output` must then be as it was."""
        before = _content(output)
        self.cases[family] += 1
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
        except UserError as error:
            self.refused[family] += 1
            lines = str(error).splitlines()
            short = len(lines) in range(1, 21) and all(len(line) <= CHARACTERS for line in lines)
            if not short:
                self._fail(family, given, f"no short line: {str(error)[:2000]!r}")
            if _content(output) != before:
                self._fail(family, given, f"left {sorted(_content(output) - before)} after {error}")
        except (Exception, HangError) as error:  # noqa: BLE001 - everything else is a finding
            places = traceback.extract_tb(error.__traceback__)
            self._fail(
                family,
                given,
                " < ".join(f"{p.filename[-40:]}:{p.lineno}" for p in places[:1:-1][:6]) + f" {error!r:.300}",
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()

    def _fail(self, family: str, given: object, what: str) -> None:
        kind = what.partition(" ")[0] if "<" in what else what[:60]
        self.failures.setdefault(f"{family}: {kind}", f"{what}\n    given {str(given)[:600]!r}")


def hang() -> None:
    """End the case."""
    raise HangError


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _content(folder: Path | None) -> set[str]:
    """Files and directories below a folder, but for empty ones."""
    if folder is None:
        return set()
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or any(path.iterdir())
    }


def to_json(value: object) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # a number of more than 4300 digits
        return b"9" * 5000
