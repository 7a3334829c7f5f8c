"""The bytes of a file, decompressed and checked: damage is an error and never a shorter text."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from typing import TYPE_CHECKING, cast

import zstandard

from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from typing_extensions import Buffer

LINE_LIMIT = 2**26
"""Bytes of the longest line of a .jsonl file that is read."""

_BLOCK = 2**18
_ZSTD_BLOCK = 2**10  # a kilobyte cannot become more than 32 MB
_SKIP_BLOCK = 2**20
_MARK = "\ufeff"
_MARK_BYTES = codecs.BOM_UTF8
_FOREIGN_MARKS = (  # that of UTF-32 (little endian) begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_COMPRESSED = (".gz", ".zst")


def plain_name(path: Path) -> str:
    """The file's name as it would be without compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in _COMPRESSED else path.name


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of `path`: several gzip members or zstd frames are read as one text.

    Raises:
        UserError: also while reading: the file cannot be read, is damaged, ends before its compressed data
            do, has something else behind them, or is text in UTF-16 or UTF-32.
    """
    try:
        with path.open("rb") as file:
            stream = file
            if path.suffix == ".gz":
                stream = cast("io.BufferedReader", gzip.GzipFile(fileobj=file))
            elif path.suffix == ".zst":
                stream = io.BufferedReader(_ZstdFrames(file), _BLOCK)
            head = stream.peek(4)
            for mark, encoding in _FOREIGN_MARKS:
                if head.startswith(mark):
                    raise UserError(f"{path}: is {encoding} text; save it as UTF-8")
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged compressed file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


class _ZstdFrames(io.RawIOBase):
    """Decompresses zstd frames to the end of a file.

    The library's own reader takes the end of the file for the end of the text, wherever it comes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = self._text = b""

    def readable(self) -> bool:
        """Tell `io.BufferedReader` that it may read."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill some of `buffer`; 0 at the end of the text.

        Raises:
            EOFError: the file ends inside a frame.
        """
        while not self._text:
            self._compressed = self._compressed or self._file.read(_ZSTD_BLOCK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends before its compressed data do")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._text, self._compressed = self._frame.decompress(self._compressed), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        view = memoryview(buffer)
        size = min(len(view), len(self._text))
        view[:size], self._text = self._text[:size], self._text[size:]
        return size


def text_blocks(path: Path) -> Iterator[bytes]:
    """A text file as valid UTF-8 in blocks, without byte order marks.

    Marks are removed wherever they stand, because files that were put behind one another bring theirs along.

    Raises:
        UserError: as `opened`; or the file is empty, binary or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, is_empty = 0, True
    with opened(path) as file:
        while True:
            block = file.read(_BLOCK)
            if b"\0" in block:
                raise UserError(f"{path}: a binary file, not text (byte {read + block.index(0)} is 0)")
            before = read - len(decoder.getstate()[0])
            read += len(block)
            try:
                text = decoder.decode(block, final=not block).replace(_MARK, "")
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(str(path), error, before)) from None
            if text:
                is_empty = False
                yield text.encode()
            if not block:
                break
    if is_empty:
        raise UserError(f"{path}: the file is empty")


def lines(path: Path) -> Iterator[bytes | None]:
    """The lines of a file, without byte order marks at their beginnings; None for one that is too long.

    Raises:
        UserError: as `opened`; or the file is empty.
    """
    is_empty = True
    with opened(path) as file:
        while line := file.readline(LINE_LIMIT):
            is_empty = False
            if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                while (rest := file.readline(_SKIP_BLOCK)) and not rest.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line.removeprefix(_MARK_BYTES)
    if is_empty:
        raise UserError(f"{path}: the file is empty")


def without_mark(text: str) -> str:
    """`text` without a byte order mark at its beginning."""
    return text.removeprefix(_MARK)


def decoded(data: bytes, where: str) -> str:
    """`data` as text.

    Raises:
        UserError: it is not UTF-8; the message begins with `where`.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(where, error, 0)) from None


def _not_utf8(where: str, error: UnicodeDecodeError, before: int) -> str:
    found = error.object[error.start]
    return f"{where}: not UTF-8 text (byte {before + error.start} is 0x{found:02x})"
