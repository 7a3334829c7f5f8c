"""Read and write files of JSON rows that grow; each row has a checksum over itself and the row above.

So a row that was changed, lost or put in shows. Rows without checksums are from an older version.
"""

from __future__ import annotations

import json
import os
import zlib
from typing import TYPE_CHECKING, Any

from tutelage.files import no_links, os_errors_to_user_errors, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CHECKSUM = "crc32"
"""Last field of a row."""

_TAIL_BYTES = 8192
"""More than a row has."""


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row. Raises `UserError` if that is not allowed."""
    before = split_row(_last_line(path))[1]
    with os_errors_to_user_errors(path), open(path, "a", encoding="utf-8", opener=no_links) as file:
        file.write(row_text(row, before))


def last_row(path: Path) -> dict[str, Any]:
    """The newest whole row; empty before there is one."""
    return split_row(_last_line(path))[0]


def _last_line(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    return lines[-2] if len(lines) > 1 else b""


def whole_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that are what was written, and the numbers of the other whole lines."""
    if not path.is_file():
        return [], []
    text = path.read_bytes()
    return checked_rows(text[: text.rfind(b"\n") + 1].decode(errors="replace"))


def keep_rows(path: Path, step: int, newest: int) -> str | None:
    """Drop rows after `step`, which a resumed run is about to write again, and damaged ones.

    There must be one of the step `newest`.

    Returns:
        A sentence if rows are lost.
    """
    if not path.is_file():
        return f"{path}: missing; the rows of {step:,} steps are lost" if step else None
    rows, damaged = whole_rows(path)
    text, before, last = "", 0, 0
    for row in rows:
        if isinstance(row.get("step"), int) and row["step"] <= step:
            line = row_text(row, before)
            text, before, last = text + line, split_row(line)[1], row["step"]
    write_text(path, text)
    if damaged:
        return f"{path}: damaged; {len(damaged)} lines from line {damaged[0]} are left out"
    return f"{path}: cut; the rows after step {last:,} to step {newest:,} are lost" if last < newest else None


def row_text(fields: Mapping[str, Any], before: int) -> str:
    """The line of a row of a file that grows; `before` is the checksum of the row above, 0 without one."""
    return json.dumps({**fields, CHECKSUM: zlib.crc32(json.dumps(fields).encode(), before)}) + "\n"


def split_row(line: bytes | str) -> tuple[dict[str, Any], int]:
    """The fields of a row and its checksum; empty if it is no row, 0 if it has no checksum."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}, 0
    if not isinstance(row, dict):
        return {}, 0
    crc32 = row.pop(CHECKSUM, 0)
    return row, crc32 if isinstance(crc32, int) else 0


def checked_rows(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file that grows that are as they were written, and the numbers of its other lines.

    A row after one that cannot be read counts as damaged too.
    """
    rows, damaged, before = [], [], 0
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        row, crc32 = split_row(line)
        unchecked = bool(row) and not before and line.endswith("\n")
        if line == row_text(row, before) if crc32 else unchecked:
            rows.append(row)
        else:
            damaged.append(number)
        before = crc32
    return rows, damaged
