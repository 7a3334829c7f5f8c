"""Standard streams that cannot harm work: closed, full, without reader, of an encoding of few characters."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

from tutelage.files import NO_SPACE, no_space

if TYPE_CHECKING:
    from typing import TextIO

_PLAIN = {
    "·": "-",
    "…": "...",
    "±": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "²": "^2",
    "\N{EN DASH}": "-",
    "—": "-",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "━": "-",
}
"""What stands for a character that an encoding does not have; for any other, a question mark."""


def prepare_streams() -> None:
    """Make the standard streams of a command such that printing does not fail for the terminal's sake.

    A descriptor that is closed is opened on nothing: else the next file that is opened would get its number,
    and whatever a library prints would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    codecs.register_error("plain", _plainly)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


class _Lasting(io.TextIOWrapper):
    """A standard stream whose reader may leave: what is written from then on goes nowhere.

    So the exit code of a command is that of its work, whoever reads how much of what it prints.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="plain",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._beneath = stream  # it would close the buffer of both if nobody held it any more

    def write(self, text: str) -> int:
        """Write."""
        try:
            return super().write(text)
        except BrokenPipeError:
            silence(self)
            return len(text)

    def flush(self) -> None:
        """Flush."""
        try:
            super().flush()
        except BrokenPipeError:
            silence(self)

    def close(self) -> None:
        """Leave open what is beneath, which is Python's own stream too."""


def _lasting(stream: TextIO | None) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Lasting):
        return stream or _nothing()
    return _Lasting(stream)


def _nothing() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for as long as the process lives


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Write what an encoding cannot say in other characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in wrong), error.end


def silence(stream: TextIO) -> None:
    """Send what is still written to `stream`, whose reader has left or whose disk is full, to nowhere."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def tell(text: str) -> None:
    """Write to standard error, if that can be written to: the exit code says the same."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def flush_streams() -> None:
    """Write what is left to be written.

    What is left are not words about work, which a console writes at once, but the data that was asked for.

    Raises:
        SystemExit: there is no space for it.
    """
    full = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            silence(stream)
            full = full or stream is sys.stdout
    if full:
        tell(f"error: {no_space('standard output')}\n")
        sys.exit(2)
