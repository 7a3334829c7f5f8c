"""The exceptions a user is meant to see, and the messages that several rooms share."""

from __future__ import annotations

import difflib
import errno
import json
import re
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

_Entry = TypeVar("_Entry")


_CONTROL = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would move a terminal's cursor, turn the order of a line, end it, or cannot be written; the name of a
file can hold it."""


_BEGINNING, _END = 500, 295


def without_controls(text: str) -> str:
    """Write what a terminal would obey as escapes that it shows; ends of lines stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _both_ends(line: str) -> str:
    """Leave out the middle of a long line: what is wrong is at one end, the remedy at the other."""
    return line if len(line) <= _BEGINNING + _END else f"{line[:_BEGINNING]} ... {line[-_END:]}"


class UserError(Exception):
    """Something in the input is wrong; the message is one line and says what would be right.

    The command line prints the message without a traceback and exits with code 2. Library users can
    catch it. Anything else that escapes is a bug of ours and keeps its traceback.

    Attributes:
        shared: whether all processes of a job raise it (`agreement`), so that only the first prints it.
    """

    shared = False

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_both_ends, without_controls(message).split("\n"))))

    def _render_traceback_(self) -> list[str]:
        """Lines that a notebook shows; IPython asks for them in the place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def check_visible(path: Path) -> None:
    """Tell a path that is not there from one that cannot be looked for.

    `Path.exists` does so until Python 3.13, and says False of both from 3.14 on.

    Raises:
        OSError: a directory above it may not be entered, or a name is too long for a file.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ENAMETOOLONG):
            raise
    except ValueError:  # no name of a file anywhere
        return


class DiskError(UserError):
    """A full disk refused to be written; nothing else is wrong, and with space the same call goes on."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """Work was stopped by Ctrl-C or a signal; what was done is on disk and the same call resumes it.

    Its text says how far the work was, such as "after step 120 of 400", where that is known.
    """

    def _render_traceback_(self) -> list[str]:
        """Lines that a notebook shows."""
        return [f"{f'stopped {self}'.rstrip()}; run the cell again to resume"]


def one_line(error: Exception, limit: int = 300) -> str:
    """Put another library's message on one line, as many whole sentences as fit into `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text
    sentences = text[:limit].rpartition(". ")[0]
    return f"{sentences or text[:limit].rpartition(' ')[0]} ..."


def shown(value: object, longest: int) -> str:
    """Show any value in one line of at most `longest` characters, texts in quotes."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of more than 4300 digits"
    return shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """Put a text on one line of at most `longest` characters that every terminal and file can hold."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def as_written(value: object) -> str:
    """The value of a setting as a settings file has it: null and true, not Python's None and True."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


_WORDS = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "none_required": "nothing (null)",
    **dict.fromkeys(("string_type", "string_unicode", "path_type"), "text"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"), "a section of settings (key: value)"
    ),
    "is_instance_of": "a {class}",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:,}",
    "greater_than_equal": "at least {ge:,}",
    "less_than": "less than {lt:,}",
    "less_than_equal": "at most {le:,}",
    "too_short": "a {kind} of {min_length:,} or more, not of {actual_length:,}",
    "too_long": "a {kind} of at most {max_length:,}",
    "string_too_short": "text of at least {min_length:,} characters",
    "string_too_long": "text of at most {max_length:,} characters",
    "string_pattern_mismatch": "ASCII letters, digits, '.', '_' and '-', and begin with a letter or digit",
}
"""What a value must be, by pydantic's name of the error, with fields of the error's context."""


def in_words(detail: ErrorDetails) -> str:
    """Say in a user's words what pydantic finds wrong with a value."""
    if detail["type"] in _WORDS:
        context = detail.get("ctx", {})
        kind = "mapping" if context.get("field_type") == "Dictionary" else "list"
        return "must be " + _WORDS[detail["type"]].format_map(context | {"kind": kind})
    return " ".join(detail["msg"].removeprefix("Value error, ").split())


def suggestion(name: str, known: Iterable[str]) -> str:
    """The words "did you mean '...'? " with the known name nearest to a mistyped one; "" if none is near."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(name.lower(), names, n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of those known; `what` says what it should name."""
    names = list(known)
    return UserError(f"{what} '{name:.80}' is unknown; {suggestion(name, names)}known: {', '.join(names)}")


def lookup(table: Mapping[str, _Entry], name: str, what: str) -> _Entry:
    """The entry called `name`.

    Args:
        table: entries by name.
        name: as a user wrote it.
        what: kind of the entry or the field that names it, for the message.

    Raises:
        UserError: there is no such entry; the message lists the names and suggests the nearest.
    """
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
