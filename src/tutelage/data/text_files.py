"""Decompress and decode files of text, and take the text out of HTML.

Whatever a file is, its text comes as UTF-8, in blocks. Damage is an error and never a shorter text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import zstandard

from tutelage.errors import UserError
from tutelage.installed import install_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from typing_extensions import Buffer

    from tutelage.config.data_config import Kind

LINE_LIMIT = 2**26
"""Bytes of the longest line of a .jsonl or .csv file that is read."""

PAGE_LIMIT = 2**24
"""Bytes of the longest page of HTML that is read: its tree can need 85 times as much memory."""

MARK = "\ufeff"
"""The byte order mark of Unicode."""

_LARGE_PAGE = 2**16
"""Bytes of a page that gets a limit of time, and so a process of its own (20 milliseconds). The parser
compares all attributes of a tag with each other, and where a tag ends nobody else can be sure of."""
_PAGE_SECONDS = 3
_XHTML_SAYS_SO = 4096  # bytes at the beginning of a page
_HOW: dict[str, Any] = {"preserve_formatting": True, "skip_elements": ["svg", "img"]}
_PROGRAM = f"""
import contextlib, sys
sys.path.append(sys.argv[1])
with contextlib.suppress(ImportError):  # Windows
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({_PAGE_SECONDS}, {_PAGE_SECONDS}))
from resiliparse.extract.html2text import extract_plain_text
page = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(extract_plain_text(page, **{_HOW!r}).encode())
"""
_BLOCK = 2**18
_ZSTD_BLOCK = 2**10  # a kilobyte cannot become more than 32 MB
_XZ_MEMORY = 2**28  # of its dictionary; the largest preset needs a quarter of it
_SKIP_BLOCK = 2**20
_MARKS = (  # that of UTF-32 (little endian) begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_DECLARED = re.compile(  # as pages and XHTML say it
    rb"""<meta[^>]{1,200}?charset\s*=\s*["']?\s*([\w.:-]+)|^\s*<\?xml[^>]{1,100}encoding\s*=\s*["']([\w.:-]+)""",
    re.IGNORECASE,
)
_XHTML = re.compile(rb"""^\s*<\?xml\s|<html\s[^>]*\bxmlns\s*=\s*["']http://www\.w3\.org/1999/xhtml""")
_EMPTY_SCRIPT = re.compile(
    rb"<script(?:\s[^<>]*)?/>"
)  # if a script writes one, its end would be the script's
_CLOSED_AT_ONCE = re.compile(  # but for those that are empty in HTML too
    rb"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)"
    rb"([A-Za-z][\w:.-]*)((?:\s[^<>]*)?)/>"
)
_AS_BROWSERS_DO = dict.fromkeys(("iso8859-1", "ascii"), "cp1252")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open the decompressed bytes of `path`; what was compressed in several parts is read as one.

    Raises:
        UserError: also while reading: the file cannot be read, is damaged, ends before its compressed data
            do, or has something else behind them.
    """
    try:
        with path.open("rb") as file:
            match path.suffix.lower():
                case ".gz":
                    yield cast("io.BufferedReader", gzip.GzipFile(fileobj=file))
                case ".zst":
                    yield io.BufferedReader(_Blocks(_zstd_frames(file)), _BLOCK)
                case ".xz":
                    new = lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)  # noqa: E731
                    yield io.BufferedReader(_Blocks(_streams(file, new)), _BLOCK)
                case ".bz2":
                    yield io.BufferedReader(_Blocks(_streams(file, bz2.BZ2Decompressor)), _BLOCK)
                case _:
                    yield file
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged compressed file ({error})") from None
    except OSError as error:
        if error.errno is None:  # of a decompressor, not of the system
            raise UserError(f"{path}: damaged compressed file ({error})") from None
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class _Blocks(io.RawIOBase):
    """Makes a stream of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Tell `io.BufferedReader` that it may read."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill some of `buffer`; return 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        view = memoryview(buffer)
        size = min(len(view), len(self._rest))
        view[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _zstd_frames(file: BinaryIO) -> Iterator[bytes]:
    """Decompress zstd frames to the end of a file.

    The library's own reader takes the end of the file for the end of the text, wherever it comes.
    """
    frame: zstandard.ZstdDecompressionObj | None = None
    data = file.read(_ZSTD_BLOCK)
    while data:
        if frame is None:
            frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(data)
        data = b""
        if frame.eof:
            data, frame = frame.unused_data, None
        data = data or file.read(_ZSTD_BLOCK)
    if frame is not None:
        raise EOFError("the file ends before its compressed data do")


def _streams(
    file: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
) -> Iterator[bytes]:
    """Decompress bzip2 or xz streams to the end of a file.

    The library's own readers ignore whatever follows the first stream and is no stream itself.
    """
    data = file.read(_BLOCK)
    while data:
        stream = new()
        while not stream.eof:
            if stream.needs_input and not data:
                data = file.read(_BLOCK)
                if not data:
                    raise EOFError("the file ends before its compressed data do")
            yield stream.decompress(data, _BLOCK)
            data = b""
        data = stream.unused_data or file.read(_BLOCK)
        if isinstance(stream, lzma.LZMADecompressor):
            while data and not (data := data.lstrip(b"\0")):  # zeros may pad a stream of xz
                data = file.read(_BLOCK)


def text_blocks(path: Path, kind: Kind = "text", encoding: str | None = None) -> Iterator[bytes]:
    """Yield the text of a file as valid UTF-8 in blocks; all its line ends become those of Unix.

    Byte order marks are removed wherever they are, because files that were concatenated bring theirs along.

    Args:
        path: the file.
        kind: "html" gives the text of a page, in one block; others are text as they stand.
        encoding: its encoding, where no byte order mark says it; None: UTF-8, or what a page declares.

    Raises:
        UserError: as `opened`; or the file is empty, binary or in another encoding, or a page is too long.
    """
    with opened(path) as file:
        head = file.read(_BLOCK)
        if not head or head in dict(_MARKS):
            raise UserError(f"{path}: the file is empty")
        name = _encoding_of(head, encoding, is_page=kind == "html")
        blocks = (block.replace(codecs.BOM_UTF8, b"") for block in _decoded(path, _from(file, head), name))
        if kind == "html":
            yield _page_text(path, blocks)
        else:
            yield from blocks


def _encoding_of(head: bytes, given: str | None, *, is_page: bool = False) -> str:
    """Return the encoding of a file that begins with `head`."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked or given or not is_page:
        return marked or given or "utf-8"
    declared = _DECLARED.search(head[:1024])
    try:
        name = codecs.lookup((declared[1] or declared[2]).decode()).name if declared else "utf-8"
    except LookupError:
        return "utf-8"
    # a declaration that could be read as ASCII is not in UTF-16, whatever it says
    return "utf-8" if name.startswith("utf-") else _AS_BROWSERS_DO.get(name, name)


def _decoded(path: Path, blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Decode blocks of a file; encode them as UTF-8, of whole characters, with the line ends of Unix.

    Raises:
        UserError: the file is binary, or in another encoding.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    read = 0
    for block in itertools.chain(blocks, [b""]):
        if b"\0" in block and not encoding.startswith(("utf-16", "utf-32")):
            raise UserError(f"{path}: a binary file, not text (byte {read + block.index(0)} is 0)")
        before = read - len(decoder.getstate()[0])
        read += len(block)
        try:
            text = decoder.decode(block, final=not block).encode()
        except UnicodeDecodeError as error:
            raise UserError(f"{not_decoded(str(path), error, before)}; {_OTHER_ENCODING}") from None
        except UnicodeError as error:
            raise UserError(f"{path}: not {encoding} text ({error}); {_OTHER_ENCODING}") from None
        if b"\0" in text:
            raise UserError(f"{path}: not {encoding} text (it has characters of code 0); {_OTHER_ENCODING}")
        if text:
            yield text


_OTHER_ENCODING = "name its encoding in the source, for example encoding: cp1252"


def not_decoded(where: str, error: UnicodeDecodeError, before: int = 0) -> str:
    """Say which byte is not text in an encoding; `before`: bytes in front of those that were decoded."""
    byte = f"byte {before + error.start} is 0x{error.object[error.start]:02x}"
    return f"{where}: not {error.encoding.upper()} text ({byte})"


def _page_text(path: Path, blocks: Iterator[bytes]) -> bytes:
    """Return the text of a page as a reader sees it: no markup, scripts or styles, a line for each block."""
    try:
        import resiliparse  # noqa: PLC0415 - an extra
        from resiliparse.extract.html2text import extract_plain_text  # noqa: PLC0415
    except ImportError:
        raise UserError(
            f"{path}: the package 'resiliparse' is missing; run: {install_extra('html')}"
        ) from None
    page = bytearray()
    for block in blocks:
        page += block
        if len(page) > PAGE_LIMIT:
            raise UserError(
                f"{path}: a page longer than {PAGE_LIMIT:,} bytes, which is the most that can be read"
            )
    if _XHTML.search(page[:_XHTML_SAYS_SO]):
        # where <title/> is an empty title; in HTML it begins one, of which all the rest would be part
        plain = _EMPTY_SCRIPT.sub(b"", _without_sections(page))
        page = bytearray(_CLOSED_AT_ONCE.sub(rb"<\1\2></\1>", plain))
    if len(page) < _LARGE_PAGE:
        text: str = extract_plain_text(page.decode(), **_HOW)
        return text.encode()
    library = str(Path(resiliparse.__file__).parents[1])
    program = [sys.executable, "-I", "-S", "-c", _PROGRAM, library]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            program, input=page, capture_output=True, check=False, timeout=20 * _PAGE_SECONDS
        )
        if done.returncode == 0:
            return done.stdout
    raise UserError(
        f"{path}: its {len(page):,} bytes of HTML cannot be parsed in {_PAGE_SECONDS} seconds; the usual "
        "reason is a tag with tens of thousands of attributes"
    )


def _without_sections(page: bytearray) -> bytes:
    """Write CDATA sections of XHTML as text with references; in HTML they are comments up to a ">"."""
    found, done = bytearray(), 0
    while (start := page.find(b"<![CDATA[", done)) >= 0 and (end := page.find(b"]]>", start)) >= 0:
        section = page[start + len(b"<![CDATA[") : end]
        found += page[done:start]
        found += section.replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;")
        done = end + len(b"]]>")
    return bytes(found + page[done:])


def lines(path: Path, encoding: str | None = None, *, as_text: bool = False) -> Iterator[bytes | None]:
    """Yield the lines of a file, without byte order marks at their beginnings; None for one that is too long.

    Args:
        path: the file.
        encoding: as for `text_blocks`. Lines in UTF-8 are not checked: one may be bad, the next good.
        as_text: check and decode the file as `text_blocks` does, though marks within a line stay.

    Raises:
        UserError: as `opened`; or the file is empty, or not in the encoding that is not UTF-8.
    """
    with opened(path) as file:
        head = file.read(_BLOCK)
        if not head:
            raise UserError(f"{path}: the file is empty")
        name, blocks = _encoding_of(head, encoding), _from(file, head)
        if as_text or name != "utf-8":
            blocks = _decoded(path, blocks, name)
        stream = io.BufferedReader(_Blocks(blocks), _BLOCK)
        while line := stream.readline(LINE_LIMIT):
            if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
                yield None  # before the rest is read, which the caller may not want
                while (rest := stream.readline(_SKIP_BLOCK)) and not rest.endswith(b"\n"):
                    pass
            else:
                yield line.removeprefix(codecs.BOM_UTF8)


def _from(file: BinaryIO, head: bytes) -> Iterator[bytes]:
    """Yield a file in blocks, of which the first has been read."""
    return itertools.chain([head], iter(lambda: file.read(_BLOCK), b""))
