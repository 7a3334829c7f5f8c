"""Read JSON and JSON Lines files as strict records, with one exception for everything that is wrong."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


class UnreadableError(Exception):
    """A result file is missing or wrong; the message starts with the file's name."""


class Record(BaseModel):
    """Base of what is read: types are strict, NaN is an error, fields of later versions are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


def read_model(path: Path, kind: type[T]) -> T:
    """A JSON file as one record. Raises `UnreadableError`."""
    return _parse(path.name, _text(path), kind)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """A JSON Lines file, one record per line, at least one. Raises `UnreadableError`."""
    lines = _text(path).splitlines()
    if not lines:
        raise UnreadableError(f"{path.name}: empty")
    try:
        records: list[T] = _adapter(list[kind]).validate_json(f"[{','.join(lines)}]", strict=True)  # type: ignore[valid-type]
    except ValidationError:
        records = []
    if len(records) == len(lines):
        return records
    return [_parse(f"{path.name}, line {i}", line, kind) for i, line in enumerate(lines, start=1)]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a type, or a list of one
    """Building one costs more than reading a file with it."""
    return TypeAdapter(kind)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UnreadableError(f"{path.name}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path.name}: {error}") from None


def _parse(where: str, text: str, kind: type[T]) -> T:
    try:
        record: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type] # a type is hashable
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UnreadableError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None
    return record
