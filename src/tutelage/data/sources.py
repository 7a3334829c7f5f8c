"""Documents from corpora, files and the Hub, and the mixture of several sources.

Every source can be read again from its beginning, in the same order. Nothing is held in memory but
the document at hand and, in a mixture, one 16-byte hash per document to find exact duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.data import hubrows, textfiles
from tutelage.data.config import (
    CorpusPairs,
    CorpusSource,
    FilePairs,
    FilesSource,
    HubPairs,
    HubSource,
    PairSource,
    Source,
    TextSource,
)
from tutelage.data.corpora import find_corpus, find_pairs
from tutelage.data.pairs import Piece, read_pairs
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import JsonValue

    from tutelage.data.chat import Chat


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
        """The whole text: not blank, and different from every document before it."""
        return _joined(self.pieces)


@dataclass(slots=True)
class Tally:
    """What a pass over a mixture took, per source, and what it dropped.

    Attributes:
        documents: documents taken, one number per source.
        bytes: bytes of UTF-8 taken, one number per source.
        duplicates: documents dropped because the same text had come before.
        blank: documents dropped because they hold nothing but white space.
    """

    documents: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    duplicates: int = 0
    blank: int = 0


def read_documents(source: TextSource) -> Iterator[str]:
    """The documents of one source of text, in a fixed order.

    Raises:
        UserError: the source is missing, damaged, empty, not text or lacks the field; raised when the
            offending document is asked for.
    """
    match source:
        case CorpusSource():
            return find_corpus(source.name).documents()
        case FilesSource():
            return textfiles.read(source)
        case HubSource():
            rows = hubrows.read_rows(source)
            return (textfiles.text_of(row, source.field, where) for where, row in rows)


def describe(source: Source) -> dict[str, JsonValue]:
    """What fixes the text of a source: versions, checksums, revision. It becomes part of a store's name.

    Raises:
        UserError: the corpus is unknown, or a file is missing.
    """
    match source:
        case CorpusSource():
            return {"kind": source.kind, **find_corpus(source.name).identity()}
        case CorpusPairs():
            return {"kind": source.kind, **find_pairs(source.name).identity()}
        case FilesSource() | FilePairs():
            files: list[JsonValue] = [_file_identity(path) for path in textfiles.find(source.paths)]
            return {"kind": source.kind, "files": files}
        case HubSource() | HubPairs():
            fixed: dict[str, JsonValue] = source.model_dump(
                include={"kind", "path", "subset", "split", "revision"}
            )
            if Path(source.path).is_dir():
                inside = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
                fixed["files"] = [_file_identity(path) for path in inside]
            return fixed


def mixed(
    sources: Sequence[Source],
    max_bytes: int | None = None,
    tally: Tally | None = None,
    chat: Chat | None = None,
) -> Iterator[Document]:
    """Read several sources as one text, without blank documents and exact duplicates.

    Without weights the sources follow one another. With weights the next document comes from the source
    that has given the fewest bytes per weight so far, and the mixture ends with the first source that
    runs out, so that the shares hold to the end.

    Args:
        sources: all with a weight, or all without.
        max_bytes: end with the document that reaches this many bytes of UTF-8; None: no limit.
        tally: filled while reading.
        chat: renders the conversations of sources with `template: chat`.
    """
    tally = Tally() if tally is None else tally
    tally.documents, tally.bytes = [0] * len(sources), [0] * len(sources)
    seen: set[bytes] = set()
    streams = [_distinct(source, index, seen, tally, chat) for index, source in enumerate(sources)]
    weights = [source.weight for source in sources if source.weight is not None]
    for document in _balanced(streams, weights, tally) if weights else itertools.chain(*streams):
        yield document
        if max_bytes is not None and sum(tally.bytes) >= max_bytes:
            return


def _read(source: Source, chat: Chat | None) -> Iterator[tuple[Piece, ...]]:
    if isinstance(source, PairSource):
        return read_pairs(source, chat)
    return ((Piece(text),) for text in read_documents(source))


def _joined(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text for piece in pieces)


def _distinct(
    source: Source, index: int, seen: set[bytes], tally: Tally, chat: Chat | None
) -> Iterator[Document]:
    """The documents of one source that are neither blank nor seen before, counted in `tally`."""
    for pieces in _read(source, chat):
        text = _joined(pieces)
        if not text or text.isspace():
            tally.blank += 1
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            start = " ".join(text[:40].split())
            raise UserError(
                f"source {index + 1}: the document that begins {start!r} holds half of a surrogate pair, "
                "which is no valid text"
            ) from None
        digest = hashlib.blake2b(data).digest()
        if digest[:16] in seen:
            tally.duplicates += 1
            continue
        seen.add(digest[:16])
        tally.documents[index] += 1
        tally.bytes[index] += len(data)
        yield Document(pieces, len(data), int.from_bytes(digest[:8], "big") / 2**64)


def _balanced(
    streams: Sequence[Iterator[Document]], weights: Sequence[float], tally: Tally
) -> Iterator[Document]:
    while True:
        index = min(range(len(streams)), key=lambda i: tally.bytes[i] / weights[i])
        document = next(streams[index], None)
        if document is None:
            return
        yield document


def _file_identity(path: Path) -> dict[str, JsonValue]:
    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return {"name": path.name, "size": path.stat().st_size, "sha256": checksum}
