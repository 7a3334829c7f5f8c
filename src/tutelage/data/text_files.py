"""Documents and rows from local files: .txt, .md, .jsonl (each also .gz or .zst) and .parquet.

What is wrong with a file raises `UserError`. What is wrong with one row is handed on in its place, as a
`BadRowError`, because whoever reads may want the other rows.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config.data_config import DOCUMENT_LIMIT
from tutelage.data.cutting import WHOLE, document_size, documents_of
from tutelage.data.streams import LINE_LIMIT, decoded, lines, plain_name, without_mark
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyarrow import RecordBatch

    from tutelage.config.data_config import FilesSource

_ENDINGS = ".txt, .md and .jsonl (each also .gz or .zst) and .parquet"
_TEXT = (".txt", ".md")
_BATCH_ROWS = 1024
_BATCH_BYTES = 2**22


class BadRowError(UserError):
    """One row cannot be used; the message names its file and line. The rows after it can be read."""


Row = tuple[str, object]
"""The file and line (or data set and row) for messages, and what is there, or a `BadRowError`."""


def find(names: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name: patterns in turn, their matches sorted.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a directory is given.
    """
    found: dict[Path, None] = {}
    for text in names:
        try:
            found.update(dict.fromkeys(_matches(text)))
        except OSError as error:
            raise UserError(f"{text}: cannot be read ({error.strerror})") from None
    return list(found)


def _matches(text: str) -> list[Path]:
    path = Path(text).expanduser()
    paths = [path]
    if glob.has_magic(str(path)) and not path.exists():
        paths = [Path(name) for name in sorted(glob.glob(_pattern(path), recursive=True))]  # noqa: PTH207 - absolute too
        paths = [path for path in paths if not path.is_dir()]
    elif path.is_dir():
        raise UserError(f"{text}: is a directory; name its files, for example {Path(text) / '*.txt'}")
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: no such file: a link to {path.readlink()}, which is not there")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file that can be read twice")
    if not paths or not paths[0].exists():
        raise UserError(f"{text}: no such file")
    return paths


def _pattern(path: Path) -> str:
    """A pattern whose first directories are taken by their names where they exist, brackets or not."""
    fixed = Path()
    for place, part in enumerate(path.parts):
        if not (fixed / part).exists():
            return str(Path(glob.escape(str(fixed)), *path.parts[place:]))
        fixed /= part
    return glob.escape(str(fixed))


def known_bytes(source: FilesSource) -> int:
    """Bytes of text that `source` surely holds: those of its plain text files."""
    return sum(path.stat().st_size for path in find(source.paths) if path.suffix in _TEXT)


def cut_size(source: FilesSource) -> int | None:
    """About how many bytes the documents have that the text files of `source` are cut into; None: no cuts.

    Raises:
        UserError: a file is missing or damaged.
    """
    texts = [path for path in find(source.paths) if _is_text(path)]
    return document_size(source, texts) if texts else None


def read(source: FilesSource) -> Iterator[str | BadRowError | None]:
    """The documents of `source`: of text files whole or cut, of others one per row; None for a null.

    Raises:
        UserError: a file is missing, empty, damaged or not text.
    """
    size = cut_size(source)
    whole = WHOLE if source.document_bytes == "auto" else 0
    for path in find(source.paths):
        if _is_text(path):
            yield from (document.decode() for document in documents_of(path, size, whole))
        else:
            yield from texts_of(_rows(path, (source.field,)), source.field)


def read_rows(names: Sequence[str], fields: Sequence[str]) -> Iterator[Row]:
    """The rows of .jsonl and .parquet files, in order.

    Args:
        names: paths and patterns.
        fields: what the caller will look at; of a parquet file only these columns are read.

    Raises:
        UserError: as `read`; or a file has no fields. A .jsonl row may still lack some.
    """
    for path in find(names):
        if _is_text(path):
            raise UserError(
                f"{path}: text has no fields; prompts and completions come from .jsonl or .parquet"
            )
        yield from _rows(path, fields)


def texts_of(rows: Iterator[Row], field: str) -> Iterator[str | BadRowError | None]:
    """`text_of` every row."""
    for where, row in rows:
        try:
            yield text_of(row, field, where)
        except BadRowError as error:
            yield error


def text_of(row: object, field: str, where: str) -> str | None:
    """The text of one row, without a byte order mark at its beginning; None where it is null.

    Raises:
        BadRowError: the row is no mapping, lacks the field, or holds something there that is no text, or too
            much of it.
    """
    text = value_of(row, field, where)
    if text is None:
        return None
    if not isinstance(text, str):
        shown = f" ({text})" if isinstance(text, float) else ""
        raise BadRowError(f"{where}: field '{field}' holds {type(text).__name__}{shown}, expected text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{where}: field '{field}' holds half of a surrogate pair (U+{ord(text[error.start]):04X}, "
            f"character {error.start + 1}), which is no valid text"
        ) from None
    if size > DOCUMENT_LIMIT:
        raise BadRowError(
            f"{where}: field '{field}' holds {size:,} bytes of text, at most {DOCUMENT_LIMIT:,} can be read"
        )
    return without_mark(text)


def value_of(row: object, field: str, where: str) -> object:
    """What one row holds in a field.

    Raises:
        BadRowError: the row is one, is no mapping, or lacks the field.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError(f"{where}: expected an object with the field '{field}', found {type(row).__name__}")
    if field not in row:
        raise BadRowError(f"{where}: no field '{field}'; it has: {', '.join(map(str, row)) or 'no field'}")
    return row[field]


def _is_text(path: Path) -> bool:
    return plain_name(path).endswith(_TEXT)


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    if plain_name(path).endswith(".jsonl"):
        yield from _json_rows(path)
    elif path.name.endswith(".parquet"):
        yield from _parquet_rows(path, fields)
    else:
        raise UserError(f"{path}: unknown kind of file; {_ENDINGS} can be read")


def _json_rows(path: Path) -> Iterator[Row]:
    """One row per line; empty lines are none."""
    for number, line in enumerate(lines(path), 1):
        where = f"{path}: line {number}"
        if line is None:
            yield (
                where,
                BadRowError(f"{where}: longer than {LINE_LIMIT:,} bytes, which is the most that can be read"),
            )
        elif line and not line.isspace():
            yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> object:
    try:
        row: object = json.loads(decoded(line.rstrip(b"\r\n"), where), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return BadRowError(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
    except (UserError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        return BadRowError(reason if isinstance(error, UserError) else f"{where}: not valid JSON: {reason}")
    return row


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of a row; json itself would keep the last of several values without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(
            f"{path}: the package 'pyarrow' is missing; run: pip install 'tutelage[hub]'"
        ) from None
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        for field in fields:
            names = file.schema_arrow.names
            if names.count(field) != 1:
                several = "no column" if field not in names else f"{names.count(field)} columns"
                raise UserError(f"{path}: {several} '{field}'; it has: {', '.join(names)}")
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty")
        # a batch is decoded at once, so it has fewer rows where rows are long
        total = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        size = min(_BATCH_ROWS, max(1, _BATCH_BYTES * file.metadata.num_rows // max(1, total)))
        number = 0
        for batch in file.iter_batches(batch_size=size, columns=list(fields)):
            for place in range(batch.num_rows):
                number += 1
                where = f"{path}: row {number}"
                yield where, _parquet_row(batch, place, where)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from None


def _parquet_row(batch: RecordBatch, place: int, where: str) -> object:
    """One row; what is no UTF-8 is its own fault alone."""
    try:
        return {name: batch.column(name)[place].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return BadRowError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})"
        )
