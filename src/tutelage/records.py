"""Read JSON files as strict records, with one exception for everything that is wrong with a file."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tutelage.errors import UserError, in_words
from tutelage.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


class UnreadableError(Exception):
    """A file of records is missing or wrong.

    Attributes:
        reason: what is wrong, without the name of the file, with which the message begins.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


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
    return _parse(path.name, _text(path), kind)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Read a JSON Lines file, one record per line and at least one. Raises `UnreadableError`."""
    lines = _text(path).splitlines()
    if not lines:
        raise UnreadableError(path.name, "empty")
    try:
        records: list[T] = _adapter(list[kind]).validate_json(f"[{','.join(lines)}]", strict=True)  # type: ignore[valid-type]
    except ValidationError:
        records = []
    if len(records) == len(lines):
        return records
    return [_parse(f"{path.name}, line {i}", line, kind) for i, line in enumerate(lines, start=1)]


def write_manifest_file(directory: Path, manifest: Record) -> None:
    """Write `directory/manifest.json` with a checksum over all its fields, `seal`."""
    fields = manifest.model_dump(mode="json")
    write_text(directory / "manifest.json", json.dumps(fields | {"seal": _seal(fields)}, indent=2) + "\n")


def _seal(fields: dict[str, Any]) -> str:
    """SHA-256 over the fields of a manifest."""
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
        remedy: the command that makes one.

    Raises:
        UserError: it is missing, damaged, is no such manifest, or has another schema version.
    """
    path = directory / "manifest.json"
    if not path.exists():
        missing = "has no manifest.json" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: not a {what} ({missing}); `{remedy}` makes one")
    try:
        text = _text(path)
        head = _parse(path.name, text, _Head)
        fields = head.model_extra or {}
        if head.schema_version != version and field in fields:
            raise UserError(
                f"{directory}: {what} of schema version {head.schema_version}, this version reads {version}; "
                f"build it again with `{remedy}`"
            )
        fields = {"schema_version": head.schema_version, **fields}
        seal = fields.pop("seal", None)
        manifest = _parse(path.name, json.dumps(fields), kind)
    except UnreadableError as error:
        raise UserError(f"{path}: not the manifest of a {what} ({error.reason})") from None
    if seal != _seal(fields):
        raise UserError(
            f"{path}: damaged: its fields are not those that were written; delete it and run `{remedy}` again"
        )
    return manifest


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a type, or a list of one
    """Building one costs more than reading a file with it."""
    return TypeAdapter(kind)


def _text(path: Path) -> str:
    try:
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
