"""Read files of text: find them, decompress and check their bytes, cut long ones between paragraphs.

Damage is an error and never a shorter text.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

import zstandard

from tutelage.config.data_config import DOCUMENT_LIMIT
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from typing_extensions import Buffer

    from tutelage.config.data_config import FilesSource

LINE_LIMIT = 2**26
"""Bytes of the longest line of a .jsonl file that is read."""

MARK = "\ufeff"
"""The byte order mark of Unicode."""

_TEXT = (".txt", ".md")
_BLOCK = 2**18
_ZSTD_BLOCK = 2**10  # a kilobyte cannot become more than 32 MB
_SKIP_BLOCK = 2**20
_FOREIGN_MARKS = (  # that of UTF-32 (little endian) begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

_WHOLE = 8192  # bytes up to which a text file always stays one document, unless a size is given
_ENOUGH = 200  # documents after which 5% for a split is next to never nothing (.95 ** 200 = 3.5e-5)
_SMALLEST = 512
_LARGEST_OF_MANY = 2**20
_PARAGRAPH_END = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_WORD_END = re.compile(rb"[ \t\r]")
_CONTINUATION = range(0x80, 0xC0)  # bytes that are not the first one of a character


def find(names: Sequence[str]) -> list[Path]:
    """Return the files that paths and patterns name: patterns in turn, their matches sorted.

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
    """Return a pattern in which the first directories are literal, brackets or not, as far as they exist."""
    fixed = Path()
    for place, part in enumerate(path.parts):
        if not (fixed / part).exists():
            return str(Path(glob.escape(str(fixed)), *path.parts[place:]))
        fixed /= part
    return glob.escape(str(fixed))


def is_text(path: Path) -> bool:
    """Return whether a file is text as a whole, by its ending."""
    return plain_name(path).endswith(_TEXT)


def plain_name(path: Path) -> str:
    """Return the file's name as it would be without compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in {".gz", ".zst"} else path.name


def known_bytes(source: FilesSource) -> int:
    """Return the bytes of text that `source` holds at least: those of its plain text files."""
    return sum(path.stat().st_size for path in find(source.paths) if path.suffix in _TEXT)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open the decompressed bytes of `path`; several gzip members or zstd frames are read as one text.

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
        """Fill some of `buffer`; return 0 at the end of the text.

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
    """Yield a text file as valid UTF-8 in blocks, without byte order marks.

    Marks are removed wherever they are, because files that were concatenated bring theirs along.

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
                text = decoder.decode(block, final=not block).replace(MARK, "")
            except UnicodeDecodeError as error:
                raise UserError(not_utf8(str(path), error, before)) from None
            if text:
                is_empty = False
                yield text.encode()
            if not block:
                break
    if is_empty:
        raise UserError(f"{path}: the file is empty")


def lines(path: Path) -> Iterator[bytes | None]:
    """Yield the lines of a file, without byte order marks at their beginnings; None for one that is too long.

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
                yield line.removeprefix(codecs.BOM_UTF8)
    if is_empty:
        raise UserError(f"{path}: the file is empty")


def not_utf8(where: str, error: UnicodeDecodeError, before: int = 0) -> str:
    """Say which byte is not UTF-8; `before`: bytes in front of those that were decoded."""
    return f"{where}: not UTF-8 text (byte {before + error.start} is 0x{error.object[error.start]:02x})"


def cut_size(source: FilesSource) -> int | None:
    """Return about how many bytes a document cut from the text files of `source` has; None: no cuts.

    With `document_bytes: auto`, a source of 200 files or more has enough documents, so only what is longer
    than 1 MiB is cut. Of fewer files, what is longer than 8 KiB is cut into about 200 documents in all, of
    512 bytes at least and 8 KiB at most.

    Raises:
        UserError: a file is missing or damaged.
    """
    texts = [path for path in find(source.paths) if is_text(path)]
    if not texts or source.document_bytes == "file":
        return None
    if source.document_bytes != "auto":
        return source.document_bytes
    if len(texts) >= _ENOUGH:
        return _LARGEST_OF_MANY
    total = 0
    for path in texts:
        size = _text_size(path, _ENOUGH * _WHOLE)
        total += size if size > _WHOLE else 0
        if total >= _ENOUGH * _WHOLE:
            break
    return min(max(_SMALLEST, total // _ENOUGH), _WHOLE)


def _text_size(path: Path, limit: int) -> int:
    """Return the bytes of the text in a file; counting ends at `limit`."""
    size = 0
    with opened(path) as file:
        while size < limit and (block := file.read(_BLOCK)):
            size += len(block)
    return size


def file_documents(path: Path, source: FilesSource, size: int | None) -> Iterator[str]:
    """Yield the documents of a text file; `size` is the `cut_size` of its source."""
    whole = _WHOLE if source.document_bytes == "auto" else 0
    return (document.decode() for document in documents_of(path, size, whole))


def documents_of(path: Path, size: int | None, whole: int) -> Iterator[bytes]:
    """Yield the documents of a text file, which joined are its text to the byte.

    Args:
        path: the file.
        size: about how many bytes a document has; None: the file is one.
        whole: bytes up to which the file is not cut.

    Raises:
        UserError: the file cannot be read, or is one document and too long for that.
    """
    first, buffer = True, bytearray()
    for block in text_blocks(path):
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
