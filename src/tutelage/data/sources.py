"""Read documents from corpora, files and the Hub, and mix several sources.

Every source can be read again from its beginning, in the same order. Memory holds the current document and
one 16-byte hash per document to find exact duplicates. Rows that are not used are counted.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tutelage.config.data_config import (
    CorpusPairs,
    CorpusSource,
    FilePairs,
    FilesSource,
    HubPairs,
    HubSource,
    Source,
)
from tutelage.data.chat import read_pairs
from tutelage.data.corpora import find_corpus, find_pairs
from tutelage.data.find_files import find
from tutelage.data.pieces import Piece
from tutelage.data.row_readers import BadRowError, file_texts, hub_texts
from tutelage.data.store_manifest import Left
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import JsonValue

    from tutelage.data.chat import Chat

_COUNTED_BYTES = 10**9
_IDENTITY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a mixture.

    Attributes:
        pieces: its text in order: one piece, or prompts and completions by turns.
        size: bytes of the text as UTF-8.
        position: a number in [0, 1) that depends on the text alone; it decides the split.
    """

    pieces: tuple[Piece, ...]
    size: int
    position: float

    @property
    def text(self) -> str:
        """The whole text: not blank, and different from every document before it, unless in other pieces."""
        return _joined(self.pieces)


@dataclass(slots=True)
class Tally:
    """Counts the rows of one source: documents of the mixture, or dropped for one of four reasons.

    A row is a row of a file or data set, a text file or a part of it that became a document, or a document of
    a corpus.

    Attributes:
        documents: documents taken.
        bytes: their bytes of UTF-8.
        dropped: rows left out, by reason: `null`; `blank`, if they hold nothing or white space only;
            `duplicate`, if the same text, in the same pieces, had come before in any source; `bad`, if they
            could not be used (`on_bad_row: skip`).
        first_bad: what was wrong with the first bad one.
    """

    documents: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: {"null": 0, "blank": 0, "duplicate": 0, "bad": 0})
    first_bad: str | None = None


def describe(source: Source) -> dict[str, JsonValue]:
    """Return the identity of the text of a source: versions, checksums, revision. A store's name covers it.

    Raises:
        UserError: the corpus is unknown, or a file is missing.
    """
    match source:
        case CorpusSource():
            return {"kind": source.kind, **find_corpus(source.name).identity()}
        case CorpusPairs():
            return {"kind": source.kind, **find_pairs(source.name).identity()}
        case FilesSource() | FilePairs():
            files: list[JsonValue] = [_file_identity(path) for path in find(source.paths, source.format)]
            return {"kind": source.kind, "files": files}
        case HubSource() | HubPairs():
            fixed: dict[str, JsonValue] = source.model_dump(
                include={"kind", "path", "subset", "split", "revision"}
            )
            if Path(source.path).is_dir():
                inside = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
                fixed["files"] = [_file_identity(path) for path in inside]
            return fixed


class Mixture:
    """Several sources read as one text, without blank documents and exact duplicates. It can be read once.

    Without weights the sources follow one another. With weights the next document comes from the source
    that has given the fewest bytes per weight so far, and the mixture ends with the first source that
    runs out, so that the shares hold to the end.

    Args:
        sources: all with a weight, or all without.
        max_bytes: end with the document that reaches this many bytes of UTF-8; None: no limit.
        chat: renders the conversations of sources with `template: chat`.

    Attributes:
        tallies: counts of the rows of each source, filled while reading.
        ended_by: what ended it: "max_bytes", or the place of the source that ran out before others did; None
            while it is read, and where every source was read to its end.
    """

    def __init__(
        self, sources: Sequence[Source], max_bytes: int | None = None, chat: Chat | None = None
    ) -> None:
        self.tallies = [Tally() for _ in sources]
        self.ended_by: int | Literal["max_bytes"] | None = None
        self._weights = [source.weight for source in sources if source.weight is not None]
        self._max_bytes = max_bytes
        self._seen: set[bytes] = set()
        self._is_remote = [isinstance(source, HubSource | HubPairs) for source in sources]
        self._streams = [self._distinct(source, index, chat) for index, source in enumerate(sources)]

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, in a fixed order.

        Raises:
            UserError: a source is missing, damaged, empty, not text, or has a bad row and is not to skip it;
                raised at the document that causes it.
        """
        for document in self._balanced() if self._weights else itertools.chain(*self._streams):
            yield document
            if self._max_bytes is not None and sum(tally.bytes for tally in self.tallies) >= self._max_bytes:
                self.ended_by = "max_bytes"
                return

    def count_left(self) -> list[Left | None]:
        """Return what was left of each source when another ended the mixture; None where that is not known.

        Files and corpora are read on for it, each for up to a gigabyte of text; data sets are not.
        """
        if not isinstance(self.ended_by, int):
            return [None] * len(self._streams)
        return [self._left(index) for index in range(len(self._streams))]

    def _left(self, index: int) -> Left | None:
        if self._is_remote[index]:
            return None
        taken, self.tallies[index] = self.tallies[index], Tally()
        for _ in self._streams[index]:
            if self.tallies[index].bytes >= _COUNTED_BYTES:
                break
        rest, self.tallies[index] = self.tallies[index], taken
        return Left(documents=rest.documents, bytes=rest.bytes, is_all=rest.bytes < _COUNTED_BYTES)

    def _distinct(self, source: Source, index: int, chat: Chat | None) -> Iterator[Document]:
        """Yield the documents of one source that are neither blank nor seen before, and count its rows."""
        for pieces in _read(source, chat):
            tally = self.tallies[index]
            if isinstance(pieces, BadRowError):
                if source.on_bad_row == "stop":
                    raise UserError(f"{pieces}; on_bad_row: skip leaves such rows out")
                tally.dropped["bad"] += 1
                tally.first_bad = tally.first_bad or str(pieces)
                continue
            if pieces is None:
                tally.dropped["null"] += 1
                continue
            text = _joined(pieces)
            if not text or text.isspace():
                tally.dropped["blank"] += 1
                continue
            data = text.encode()
            digest = hashlib.blake2b(data).digest()
            identity = _identity(pieces, digest)
            if identity in self._seen:
                tally.dropped["duplicate"] += 1
                continue
            self._seen.add(identity)
            tally.documents += 1
            tally.bytes += len(data)
            # by the text alone, so that equal text is never in two splits, whatever its pieces
            yield Document(pieces, len(data), int.from_bytes(digest[:8], "big") / 2**64)

    def _balanced(self) -> Iterator[Document]:
        while True:
            shares = [tally.bytes / weight for tally, weight in zip(self.tallies, self._weights, strict=True)]
            index = shares.index(min(shares))
            document = next(self._streams[index], None)
            if document is None:
                self.ended_by = index if len(self._streams) > 1 else None
                return
            yield document


def _read(source: Source, chat: Chat | None) -> Iterator[tuple[Piece, ...] | BadRowError | None]:
    """Yield the content of every row of a source; None for null."""
    match source:
        case CorpusSource():
            return ((Piece(text),) for text in find_corpus(source.name).documents())
        case FilesSource():
            return map(_piece, file_texts(source))
        case HubSource():
            return map(_piece, hub_texts(source))
        case _:
            return read_pairs(source, chat)


def _piece(text: str | BadRowError | None) -> tuple[Piece] | BadRowError | None:
    return (Piece(text),) if isinstance(text, str) else text


def _joined(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text for piece in pieces)


def _identity(pieces: tuple[Piece, ...], text_digest: bytes) -> bytes:
    """Return a hash that is equal only for the same text in the same pieces."""
    if not any(piece.is_prompt or piece.markup for piece in pieces):
        return text_digest[:_IDENTITY_BYTES]
    found = hashlib.blake2b(digest_size=_IDENTITY_BYTES, person=b"pieces")
    for piece in pieces:
        text = piece.text.encode()
        found.update(struct.pack("<Q2?", len(text), piece.is_prompt, piece.markup) + text)
    return found.digest()


def _file_identity(path: Path) -> dict[str, JsonValue]:
    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return {"name": path.name, "size": path.stat().st_size, "sha256": checksum}
