"""Long text files as several documents, cut between paragraphs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tutelage.config.data_config import DOCUMENT_LIMIT
from tutelage.data.streams import opened, text_blocks
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tutelage.config.data_config import FilesSource

WHOLE = 8192
"""Bytes up to which a text file always stays one document, unless a size is given."""

_ENOUGH = 200  # documents after which 5% for a split is next to never nothing (.95 ** 200 = 3.5e-5)
_SMALLEST = 512
_LARGEST_OF_MANY = 2**20
_READ = 2**18
_PARAGRAPH_END = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_WORD_END = re.compile(rb"[ \t\r]")
_CONTINUATION = range(0x80, 0xC0)  # bytes that are not the first one of a character


def document_size(source: FilesSource, texts: Sequence[Path]) -> int | None:
    """About how many bytes a document cut from the text files of `source` has; None: each file is one.

    With `document_bytes: auto`, a source of 200 files or more has enough documents, so only what is longer
    than 1 MiB is cut. Of fewer files, what is longer than 8 KiB is cut into about 200 documents in all, of
    512 bytes at least and 8 KiB at most.
    """
    if source.document_bytes == "file":
        return None
    if source.document_bytes != "auto":
        return source.document_bytes
    if len(texts) >= _ENOUGH:
        return _LARGEST_OF_MANY
    total = 0
    for path in texts:
        size = _text_size(path, _ENOUGH * WHOLE)
        total += size if size > WHOLE else 0
        if total >= _ENOUGH * WHOLE:
            break
    return min(max(_SMALLEST, total // _ENOUGH), WHOLE)


def documents_of(path: Path, size: int | None, whole: int) -> Iterator[bytes]:
    """The documents of a text file, which put behind one another are its text to the byte.

    Args:
        path: the file.
        size: about how many bytes a document has; None: the file is one.
        whole: bytes up to which the file is not cut.

    Raises:
        UserError: the file cannot be read, or is one document and too long for that.
    """
    if size is None:
        yield _whole(path)
        return
    first, buffer = True, bytearray()
    for block in text_blocks(path):
        buffer += block
        while len(buffer) > max(4 * size, whole):
            yield _taken(buffer, _place(buffer, size))
            first = False
    if first and len(buffer) <= whole:
        yield bytes(buffer)
        return
    while len(buffer) > size + size // 2:
        yield _taken(buffer, _place(buffer, size))
    yield bytes(buffer)


def _text_size(path: Path, limit: int) -> int:
    """Bytes of the text in a file; of a compressed one, no more than `limit` and a block are counted."""
    size = 0
    with opened(path) as file:
        while size < limit and (block := file.read(_READ)):
            size += len(block)
    return size


def _whole(path: Path) -> bytes:
    text = bytearray()
    for block in text_blocks(path):
        text += block
        if len(text) > DOCUMENT_LIMIT:
            raise UserError(
                f"{path}: is one document and longer than {DOCUMENT_LIMIT:,} bytes; set document_bytes: "
                "auto, or the bytes that a document is to have, to cut it"
            )
    return bytes(text)


def _taken(buffer: bytearray, place: int) -> bytes:
    document = bytes(buffer[:place])
    del buffer[:place]
    return document


def _place(buffer: bytearray, size: int) -> int:
    """Where to cut.

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
