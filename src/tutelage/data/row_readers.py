"""Read rows and texts from files of every kind and from data sets of the Hugging Face Hub.

What is wrong with a file raises `UserError`. What is wrong with one row is yielded in its place, as a
`BadRowError`, because the caller may want the other rows.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tutelage.config.data_config import DOCUMENT_LIMIT
from tutelage.data.cutting import cut_size, file_documents, is_text
from tutelage.data.find_files import find, kind_in
from tutelage.data.text_files import LINE_LIMIT, MARK, lines, not_decoded
from tutelage.errors import UserError, shortened
from tutelage.hub_access import reading_hub
from tutelage.installed import install_extra
from tutelage.records import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pyarrow import RecordBatch
    from pyarrow.parquet import FileMetaData

    from tutelage.config.data_config import FilePairs, FilesSource, HubPairs, HubSource, Kind

_DELIMITERS: dict[Kind, str] = {"csv": ",;\t", "tsv": "\t"}
_BATCH_ROWS = 64  # no more, because a value that is stored once can be repeated in all of them
_BATCH_BYTES = 2**22


WHICH_FIELD = "field (of pairs prompt, completion, messages, tools) of the source says which is read"


class BadRowError(UserError):
    """One row cannot be used; the message names its file and line. The rows after it can be read."""


Row = tuple[str, object]
"""The file and line (or data set and row) for messages, and the content, or a `BadRowError`."""

Text = str | BadRowError | None
"""The text of one row, what is wrong with it, or None where it is null."""


def file_texts(source: FilesSource) -> Iterator[Text]:
    """Yield the documents of `source`: of text files whole or cut, of others one per row.

    Raises:
        UserError: a file is missing, empty, damaged or not text.
    """
    size, last_part, texts = cut_size(source), 0, 0
    for path in find(source.paths, source.format):
        if is_text(path, source):
            texts += 1
            for part, document in file_documents(path, source, size):
                last_part = max(last_part, part)
                yield document
        else:
            yield from _texts(_rows_of(path, source, (source.field,)), source.field)
    if source.is_cut and last_part == 0:
        mark = f"cut_at: {source.cut_at!r}" if source.cut_at else f"cut_before: {source.cut_before!r}"
        raise UserError(
            f"{', '.join(source.paths)}: {mark} cuts none of the {texts} text files; mend it, or leave it out"
        )


def hub_texts(source: HubSource) -> Iterator[Text]:
    """Yield the text of every row of a data set. Raises as `hub_rows`."""
    return _texts(hub_rows(source), source.field)


def file_rows(source: FilePairs, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of the files of `source`, in order.

    Args:
        source: paths and patterns.
        fields: what the caller will use; of a parquet or csv file only these columns are read.

    Raises:
        UserError: as `file_texts`; or a file has no fields. A .jsonl row may still lack some.
    """
    for path in find(source.paths, source.format):
        yield from _rows_of(path, source, fields)


def hub_rows(source: HubSource | HubPairs) -> Iterator[Row]:
    """Yield the rows of a data set, in order; nothing is downloaded that is not read.

    Raises:
        UserError: the package is missing, or the data set, its subset or its split; or a row cannot be
            decoded, after which no other can be read.
    """
    try:
        import datasets  # noqa: F401, PLC0415 - an extra, and slow to import
    except ImportError:
        raise UserError(
            f"hub source {source.path}: the package 'datasets' is missing; run: {install_extra('hub')}"
        ) from None
    where = f"hub source {source.path}"
    local = Path(source.path).exists()
    access = reading_hub(
        where, "download its files and read them with kind: files", explains=False, kept=False
    )
    number = 0
    try:
        with contextlib.nullcontext() if local else access:
            rows = _data_set(source)
        for number, row in enumerate(rows, 1):
            yield f"{where}, row {number}", row
    except (OSError, ValueError, RuntimeError) as error:
        place = f", after row {number}" if number else ""
        # the library decodes rows in bulk and goes no further than the first that it cannot decode
        hint = "; such rows can be skipped with kind: files only" if source.on_bad_row == "skip" else ""
        raise UserError(f"{where}{place}: {' '.join(str(error).split())}{hint}") from None


def _data_set(source: HubSource | HubPairs) -> Iterable[object]:
    from datasets import load_dataset, load_from_disk  # noqa: PLC0415 - as above

    where = {"path": source.path, "name": source.subset, "split": source.split, "revision": source.revision}
    if not Path(source.path, "state.json").is_file():
        return cast("Iterable[object]", load_dataset(**where, streaming=True))
    rows = load_from_disk(source.path).with_format(None)  # of `save_to_disk`, which the other refuses
    if source.subset is not None or source.split not in {"train", str(rows.split)}:
        raise ValueError("save_to_disk wrote one split here, without subsets; leave out subset and split")
    return cast("Iterable[object]", rows)


def _texts(rows: Iterator[Row], field: str) -> Iterator[Text]:
    for where, row in rows:
        try:
            yield text_of(row, field, where)
        except BadRowError as error:
            yield error


def text_of(row: object, field: str, where: str, hint: str = WHICH_FIELD) -> str | None:
    """Return the text of one row, without a byte order mark at its beginning; None where it is null.

    `hint` ends the message where the field is not there.

    Raises:
        BadRowError: the row is no mapping, lacks the field, or holds something in it that is no text, or too
            much text.
    """
    text = value_of(row, field, where, hint)
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
    return text.removeprefix(MARK)


def value_of(row: object, field: str, where: str, hint: str = WHICH_FIELD) -> object:
    """Return what one row holds in a field; `hint` as in `text_of`.

    Raises:
        BadRowError: the row is one, is no mapping, or lacks the field.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError(f"{where}: expected an object with the field '{field}', found {type(row).__name__}")
    if field not in row:
        known = ", ".join(map(str, row)) or "no field"
        raise BadRowError(f"{where}: no field '{field}'; it has: {known}; {hint}")
    return row[field]


def _rows_of(path: Path, source: FilesSource | FilePairs, fields: Sequence[str]) -> Iterator[Row]:
    match kind_in(path, source):
        case "jsonl":
            yield from _json_rows(path, source.encoding)
        case "csv" | "tsv" as kind:
            yield from _csv_rows(path, kind, source.encoding, fields)
        case "parquet":
            yield from _parquet_rows(path, fields)
        case _:
            raise UserError(
                f"{path}: text has no fields; prompts and completions come from .jsonl, .csv or .parquet"
            )


def _json_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """Yield one row per line; an empty line is no row."""
    for number, line in enumerate(lines(path, encoding), 1):
        where = f"{path}: line {number}"
        if line is None:
            limit = f"longer than {LINE_LIMIT:,} bytes, which is the most that can be read"
            yield where, BadRowError(f"{where}: {limit}")
        elif line and not line.isspace():
            yield where, _parsed(line.rstrip(b"\r\n"), where)


def _csv_rows(path: Path, kind: Kind, encoding: str | None, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table whose first row names the columns; an empty line is no row.

    What is wrong with the quotation marks is wrong with the file: nobody can say where the next row begins.
    """
    csv.field_size_limit(DOCUMENT_LIMIT)  # the module has one limit for all its readers, of 128 KiB
    texts = _csv_lines(path, encoding)
    first = next(texts, "")
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in _DELIMITERS[kind]}
    fitting = (mark for mark, names in headers.items() if set(fields) <= set(names))
    reader = csv.reader(
        itertools.chain([first], texts), delimiter=next(fitting, _DELIMITERS[kind][0]), strict=True
    )
    number = 1
    try:
        names = next(reader, [])
        _check_columns(path, names, fields)
        for row in reader:
            where, number = f"{path}: line {number + 1}", reader.line_num
            if row and len(row) != len(names):
                yield (
                    where,
                    BadRowError(f"{where}: {len(row)} fields, and {len(names)} columns in the first line"),
                )
            elif row:
                yield where, {field: row[names.index(field)] for field in fields}
    except csv.Error as error:
        raise UserError(
            f"{path}: line {number + 1}: not valid {kind.upper()}: {error}; inside a field a "
            "quotation mark is doubled, and the field is quoted"
        ) from None


def _csv_lines(path: Path, encoding: str | None) -> Iterator[str]:
    for number, line in enumerate(lines(path, encoding, as_text=True), 1):
        if line is None:
            raise UserError(
                f"{path}: line {number}: longer than {LINE_LIMIT:,} bytes, the most that can be read"
            )
        yield line.decode()


def _check_columns(path: Path, names: Sequence[str], fields: Sequence[str]) -> None:
    for field in fields:
        if names.count(field) != 1:
            several = "no column" if field not in names else f"{names.count(field)} columns"
            raise UserError(f"{path}: {several} '{field}'; it has: {', '.join(names)}; {WHICH_FIELD}")


def _parsed(line: bytes, where: str) -> object:
    try:
        row: object = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError(not_decoded(where, error))
    except json.JSONDecodeError as error:
        return BadRowError(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        return BadRowError(f"{where}: not valid JSON: {shortened(str(error), 200)}")
    return row


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(f"{path}: the package 'pyarrow' is missing; run: {install_extra('hub')}") from None
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
        _check_columns(path, names, fields)
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty")
        # a batch is decoded at once, so it has fewer rows where rows are long
        longest = _mean_row(file.metadata, fields)
        if longest > LINE_LIMIT:
            raise UserError(
                f"{path}: rows of {longest:,.0f} bytes, longer than {LINE_LIMIT:,}, the most that can be read"
            )
        size = max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, longest))))
        number = 0
        for batch in file.iter_batches(batch_size=size, columns=list(fields)):
            for place in range(batch.num_rows):
                number += 1
                where = f"{path}: row {number}"
                yield where, _parquet_row(batch, place, where)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({' '.join(str(error).split())})") from None


def _mean_row(metadata: FileMetaData, fields: Sequence[str]) -> float:
    """Bytes of a row in the fields that are read: the mean of the row group where it is largest."""
    longest = 0.0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        columns = (group.column(i) for i in range(group.num_columns))
        read = (one for one in columns if one.path_in_schema.split(".")[0] in fields)
        longest = max(longest, sum(one.total_uncompressed_size for one in read) / max(1, group.num_rows))
    return longest


def _parquet_row(batch: RecordBatch, place: int, where: str) -> object:
    """Return one row; bytes that are not UTF-8, and times that no calendar has, spoil only their row."""
    try:
        return {name: batch.column(name)[place].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return BadRowError(not_decoded(where, error))
    except (ValueError, OverflowError) as error:
        return BadRowError(f"{where}: a value that cannot be read ({error})")
