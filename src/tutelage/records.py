"""Read and write JSON files, objects and rows, and check their seals; one exception says what is wrong.

An object that tutelage writes ends with `seal`, a checksum over its other fields, and its text is a function
of them, so that a flipped bit shows wherever it is. In a file of rows that grows, each row has a checksum
over itself and the row above, so that one that was changed, lost or put in shows. What has no checksum was
written by an older version, and is read without a check.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tutelage.errors import UserError, check_visible, in_words, shortened, shown
from tutelage.files import no_links, os_errors_to_user_errors, regular, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

T = TypeVar("T")
_LARGEST_RECORDS = 2**28
LARGEST_JSON = 2**25
"""Bytes of the largest file that is read as JSON; as Python's objects it can take thirty times as much."""

CHECKSUM = "crc32"
"""Last field of a row."""

_TAIL_BYTES = 8192
"""More than a row has."""

_SEAL = "seal"
"""Field with the checksum of an object."""


class UnreadableError(Exception):
    """A file of records is missing or wrong.

    Attributes:
        reason: what is wrong, without the name of the file, with which the message begins.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse JSON that a user or another program wrote.

    Raises:
        ValueError: it is no JSON, not UTF-8, nested too deep, or an object has a key twice, of which json
            itself would silently keep the last; the message is one line.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice, 80)} is given twice")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object, which a user or another program wrote.

    Raises:
        UserError: it cannot be read, is too large, or holds something else.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            text = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > LARGEST_JSON:
        raise UserError(f"{path}: larger than {LARGEST_JSON:,} bytes, the most that is read as JSON")
    try:
        found = parse_json(text.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {shortened(str(error), 200)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object but a {type(found).__name__}")
    return found


class Record(BaseModel):
    """Base of what is read: strict types, no NaN, immutable; fields that it does not name are ignored.

    A subclass that must know every field, such as a manifest, sets `extra="forbid"`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _Head(Record, extra="allow"):
    """The field that a manifest of any version has."""

    schema_version: int


def read_model(path: Path, kind: type[T]) -> T:
    """Read a JSON file as one record. Raises `UnreadableError`."""
    text = _text(path)
    _unsealed(path.name, text)
    return _parse(path.name, text, kind)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Read a JSON Lines file, one record per line and at least one. Raises `UnreadableError`."""
    text = _text(path)
    lines = text.splitlines()
    if not lines:
        raise UnreadableError(path.name, "empty")
    if damaged := CHECKSUM in lines[0] and checked_rows(text)[1]:
        raise UnreadableError(f"{path.name}, line {damaged[0]}", "damaged: it is not what was written")
    try:
        records: list[T] = _adapter(list[kind]).validate_json(f"[{','.join(lines)}]", strict=True)  # type: ignore[valid-type]
    except ValidationError:
        records = []
    if len(records) == len(lines):
        return records
    return [_parse(f"{path.name}, line {i}", line, kind) for i, line in enumerate(lines, start=1)]


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON object with its seal."""
    write_text(path, sealed(fields))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object, and check its seal if it has one. Raises `UnreadableError`."""
    fields = _unsealed(path.name, _text(path))
    if fields is None:
        raise UnreadableError(path.name, "no JSON object")
    return fields


def sealed(fields: Mapping[str, Any]) -> str:
    """The text of a JSON object, the last field of which is a checksum over the others."""
    return json.dumps({**fields, _SEAL: _seal(fields)}, indent=2) + "\n"


def is_sealed(path: Path) -> bool:
    """Whether a JSON file has a seal. Raises `UnreadableError`, also if the seal is not that of the file."""
    text = _text(path)
    fields = _unsealed(path.name, text)
    return fields is not None and text == sealed(fields)


def _unsealed(where: str, text: str) -> dict[str, Any] | None:
    """The fields of an object without its seal, which is checked; None if it is no object."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(where, f"no JSON ({error})") from None
    if not isinstance(fields, dict):
        return None
    if _SEAL in fields:
        del fields[_SEAL]
        if text != sealed(fields):
            raise UnreadableError(where, "damaged: it is not what was written")
    return fields


def write_manifest_file(directory: Path, manifest: Record) -> None:
    """Write `directory/manifest.json` with its seal."""
    write_sealed(directory / "manifest.json", manifest.model_dump(mode="json"))


def _seal(fields: Mapping[str, Any]) -> str:
    """SHA-256 over the fields of an object."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest_file(
    directory: Path, kind: type[T], *, version: int, field: str, what: str, remedy: str
) -> T:
    """Read `directory/manifest.json`, which says what the directory is, and check its seal.

    Args:
        directory: the directory.
        kind: the record of this version.
        version: the schema version that this package reads.
        field: a field that tells this kind of manifest from others, in every version.
        what: the kind of directory, in words: "token store".
        remedy: what makes one, in words: "`tutelage data build`".

    Raises:
        UserError: it is missing, damaged, is no such manifest, or has another schema version.
    """
    path = directory / "manifest.json"
    if not path.exists():
        check_visible(path)
        missing = "has no manifest.json" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: not a {what} ({missing}); {remedy} makes one")
    try:
        text = _text(path)
        head = _parse(path.name, text, _Head)
        fields = head.model_extra or {}
        if head.schema_version != version and field in fields:
            raise UserError(
                f"{directory}: {what} of schema version {head.schema_version}, this version reads {version}; "
                f"build it again with {remedy}"
            )
        fields = {"schema_version": head.schema_version, **fields}
        fields.pop(_SEAL, None)
        manifest = _parse(path.name, json.dumps(fields), kind)
    except UnreadableError as error:
        raise UserError(f"{path}: not the manifest of a {what} ({error.reason})") from None
    if text != sealed(fields):
        raise UserError(f"{path}: damaged: it is not what was written; delete it and run {remedy} again")
    return manifest


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a type, or a list of one
    """Building one costs more than reading a file with it."""
    return TypeAdapter(kind)


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UnreadableError(path.name, "no file")
    try:
        if (size := path.stat().st_size) > _LARGEST_RECORDS:
            raise UnreadableError(path.name, f"{size:,} bytes; at most {_LARGEST_RECORDS:,} are read")
        return path.read_bytes().decode("utf-8")  # half the time of read_text
    except FileNotFoundError:
        raise UnreadableError(path.name, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(path.name, f"cannot be read ({error})") from None


def _parse(where: str, text: str, kind: type[T]) -> T:
    try:
        record: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type] # a type is hashable
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UnreadableError(where, f"{field + ': ' if field else ''}{in_words(first)}") from None
    return record


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
