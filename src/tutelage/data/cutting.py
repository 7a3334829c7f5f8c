"""Cut text files into documents: at marks in the text, or between paragraphs by length."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tutelage.config.data_config import DOCUMENT_LIMIT
from tutelage.data.find_files import find, kind_in
from tutelage.data.text_files import text_blocks
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tutelage.config.data_config import FilesSource

_WHOLE = 8192  # bytes up to which a text file always stays one document, unless a size is given
_ENOUGH = 200  # documents after which 5% for a split is next to never nothing (.95 ** 200 = 3.5e-5)
_SMALLEST = 512
_LARGEST_OF_MANY = 2**20
_PARAGRAPH_END = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_WORD_END = re.compile(rb"[ \t\r]")
_CONTINUATION = range(0x80, 0xC0)  # bytes that are not the first one of a character


def cut_size(source: FilesSource) -> int | None:
    """Return about how many bytes a document cut from the text files of `source` has; None: no cuts.

    With `document_bytes: auto`, a source of 200 files or more has enough documents, so only what is longer
    than 1 MiB is cut. Of fewer files, what is longer than 8 KiB is cut into about 200 documents in all, of
    512 bytes at least and 8 KiB at most. Between marks (`cut_at`) only what is longer than 1 MiB is cut.

    Raises:
        UserError: a file is missing or damaged.
    """
    texts = [path for path in find(source.paths, source.format) if is_text(path, source)]
    if not texts or source.document_bytes == "file":
        return None
    if source.document_bytes != "auto":
        return source.document_bytes
    if len(texts) >= _ENOUGH or source.is_cut:
        return _LARGEST_OF_MANY
    total = 0
    for path in texts:
        size = _text_size(path, source, _ENOUGH * _WHOLE)
        total += size if size > _WHOLE else 0
        if total >= _ENOUGH * _WHOLE:
            break
    return min(max(_SMALLEST, total // _ENOUGH), _WHOLE)


def is_text(path: Path, source: FilesSource) -> bool:
    """Return whether a file of `source` is text as a whole, and not rows."""
    return kind_in(path, source) in {"text", "html"}


def _text_size(path: Path, source: FilesSource, limit: int) -> int:
    """Return the bytes of the text in a file; counting ends at `limit`."""
    size = 0
    for block in text_blocks(path, kind_in(path, source), source.encoding):
        size += len(block)
        if size >= limit:
            break
    return size


def file_documents(path: Path, source: FilesSource, size: int | None) -> Iterator[tuple[int, str]]:
    """Yield the documents of a text file, each with the number of the part that marks (`cut_at`) put it in.

    Args:
        path: the file.
        source: says what the file is and where it is cut.
        size: the `cut_size` of the source.

    Raises:
        UserError: the file cannot be read, or has a document that is too long.
    """
    whole = _WHOLE if source.document_bytes == "auto" else 0
    blocks = text_blocks(path, kind_in(path, source), source.encoding)
    parts = enumerate(
        ([part.encode()] for part in _parts(path, blocks, source)) if source.is_cut else [blocks]
    )
    for number, part in parts:
        for document in documents_of(path, part, size, whole):
            yield number, document.decode()


def _parts(path: Path, blocks: Iterator[bytes], source: FilesSource) -> Iterator[str]:
    """Divide a text at `cut_at`, which is left out with the line ends around it, or at `cut_before`."""
    if source.cut_at is not None:
        yield from (part.strip("\n") for part in _divided(path, blocks, source.cut_at))
        return
    assert source.cut_before is not None  # noqa: S101 - one of the two is given
    begins, part, size = re.compile(source.cut_before).match, list[str](), 0
    for line in _divided(path, blocks, "\n"):
        if part and begins(line):
            yield "\n".join((*part, ""))
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
        _check_length(path, size)
    yield "\n".join(part)


def _divided(path: Path, blocks: Iterator[bytes], mark: str) -> Iterator[str]:
    """Split a text of any length as `str.split` would."""
    rest = ""
    for block in blocks:
        *parts, rest = (rest + block.decode()).split(mark)
        yield from parts
        _check_length(path, len(rest))
    yield rest


def _check_length(path: Path, size: int) -> None:
    if size > DOCUMENT_LIMIT:
        raise UserError(
            f"{path}: more than {DOCUMENT_LIMIT:,} characters in which cut_at or cut_before finds nothing; "
            "see whether they are meant for this file"
        )


def documents_of(path: Path, blocks: Iterable[bytes], size: int | None, whole: int) -> Iterator[bytes]:
    """Yield the documents of a text, which joined are the text to the byte.

    Args:
        path: the file that it is of, for messages.
        blocks: the text, as UTF-8.
        size: about how many bytes a document has; None: the text is one.
        whole: bytes up to which the text is not cut.

    Raises:
        UserError: the text is one document and too long for that, or cannot be read.
    """
    first, buffer = True, bytearray()
    for block in blocks:
        buffer += block
        if size is None and len(buffer) > DOCUMENT_LIMIT:
            raise UserError(
                f"{path}: is one document and longer than {DOCUMENT_LIMIT:,} bytes; set document_bytes: "
                "auto, or the bytes that a document is to have, to cut it"
            )
        while size is not None and len(buffer) > max(4 * size, whole):
            yield _cut_off(buffer, size)
            first = False
    if size is not None and not (first and len(buffer) <= whole):
        while len(buffer) > size + size // 2:
            yield _cut_off(buffer, size)
    yield bytes(buffer)


def _cut_off(buffer: bytearray, size: int) -> bytes:
    """Remove a document of about `size` bytes from the beginning of `buffer` and return it."""
    place = _place(buffer, size)
    document = bytes(buffer[:place])
    del buffer[:place]
    return document


def _place(buffer: bytearray, size: int) -> int:
    """Return where to cut.

    At the last paragraph end between half of `size` and `size`, else the first one up to twice `size`, else
    the last end of a line or word before `size`, else between two characters.
    """
    half = size // 2
    before = [found.end() for found in _PARAGRAPH_END.finditer(buffer, half, size)]
    if before:
        return before[-1]
    after = _PARAGRAPH_END.search(buffer, size, min(2 * size, len(buffer) - half))
    if after is not None:
        return after.end()
    for pattern in (_LINE_END, _WORD_END):
        ends = [found.end() for found in pattern.finditer(buffer, half, size)]
        if ends:
            return ends[-1]
    while buffer[size] in _CONTINUATION:
        size += 1
    return size
