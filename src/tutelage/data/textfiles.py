"""Documents from local files: .txt, .jsonl (each also .gz or .zst) and .parquet."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import zstandard

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tutelage.data.config import FilesSource

    Row = tuple[str, Mapping[str, object]]

_ENDINGS = ".txt, .jsonl, .txt.gz, .txt.zst, .jsonl.gz, .jsonl.zst and .parquet"


def find(names: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name: patterns in turn, their matches sorted.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a directory is given.
    """
    found: dict[Path, None] = {}
    for text in names:
        pattern = str(Path(text).expanduser())
        paths = [Path(pattern)] if Path(pattern).exists() else []
        if glob.has_magic(pattern) and not paths:
            paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 - absolute too
            paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f"{text}: no such file")
        if paths[0].is_dir():
            raise UserError(f"{text}: is a directory; name its files, for example {text.rstrip('/')}/*.txt")
        found.update(dict.fromkeys(paths))
    return list(found)


def known_bytes(source: FilesSource) -> int:
    """Bytes of text that `source` surely holds: those of its plain .txt files."""
    return sum(path.stat().st_size for path in find(source.paths) if path.suffix == ".txt")


def read(source: FilesSource) -> Iterator[str]:
    """The documents of `source`: a .txt file is one, a .jsonl line or a .parquet row is one.

    Raises:
        UserError: a file is missing, empty, damaged or not text, or a row lacks the field.
    """
    for path in find(source.paths):
        if _name(path).endswith(".txt"):
            yield _whole(path)
        else:
            for where, row in _rows(path, (source.field,)):
                yield text_of(row, source.field, where)


def read_rows(names: Sequence[str], fields: Sequence[str]) -> Iterator[Row]:
    """(file and line, row) of .jsonl and .parquet files, in order.

    Args:
        names: paths and patterns.
        fields: what the caller will look at; of a parquet file only these columns are read.

    Raises:
        UserError: as `read`; or a file has no fields. A .jsonl row may still lack some.
    """
    for path in find(names):
        if _name(path).endswith(".txt"):
            raise UserError(
                f"{path}: text has no fields; prompts and completions come from .jsonl or .parquet"
            )
        yield from _rows(path, fields)


def text_of(row: object, field: str, where: str) -> str:
    """The text of one row; "" where it is null.

    Raises:
        UserError: the row is no mapping, lacks the field, or holds something else than text there.
    """
    text = value_of(row, field, where)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' holds {type(text).__name__}, expected text")
    return text


def value_of(row: object, field: str, where: str) -> object:
    """What one row holds in a field.

    Raises:
        UserError: the row is no mapping, or lacks the field.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the field '{field}', found {type(row).__name__}")
    if field not in row:
        raise UserError(f"{where}: no field '{field}'; it has: {', '.join(map(str, row)) or 'no field'}")
    return row[field]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of `path`; what can go wrong while reading becomes a `UserError`."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                yield cast("BinaryIO", gzip.GzipFile(fileobj=file))
            elif path.suffix == ".zst":
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield io.BufferedReader(cast("io.RawIOBase", reader))
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged compressed file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _whole(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
    if not data:
        raise UserError(f"{path}: the file is empty")
    if b"\0" in data:
        raise UserError(f"{path}: a binary file, not text")
    return _decoded(data, str(path))


def _name(path: Path) -> str:
    """The file's name as it would be without compression."""
    return path.name.removesuffix(".gz").removesuffix(".zst")


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    if _name(path).endswith(".jsonl"):
        yield from _json_rows(path)
    elif path.name.endswith(".parquet"):
        yield from _parquet_rows(path, fields)
    else:
        raise UserError(f"{path}: unknown kind of file; {_ENDINGS} can be read")


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            if not line.isspace():
                yield where, _parsed(_decoded(line, where), where)
    if number == 0:
        raise UserError(f"{path}: the file is empty")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})"
        ) from None


def _parsed(line: str, where: str) -> Mapping[str, object]:
    try:
        return cast("Mapping[str, object]", json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(
            f"{path}: the package 'pyarrow' is missing; run: pip install 'tutelage[hub]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        for field in fields:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column '{field}'; it has: {', '.join(file.schema_arrow.names)}")
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(fields)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from None
