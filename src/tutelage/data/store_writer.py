"""The writing side of a token store: documents to their splits, ids and mask to disk, in one stream."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from tutelage.data.source_bytes import SourceBytes
from tutelage.data.sources import Document, Mixture
from tutelage.data.store_manifest import SCORED, SPLITS, SplitRecord, rows_left_out
from tutelage.data.tokenizer_comparison import RoundTrip
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tutelage.config.data_config import StoreConfig
    from tutelage.data.chat import Piece
    from tutelage.data.tokenizer import TextTokenizer
    from tutelage.progress import Progress
    from tutelage.types import Split

    Encode = Callable[[Sequence[str]], list[bytes]]

_BATCH_BYTES = 4_000_000
_SAMPLE_BYTES_PER_ENTRY = 4000
_SAMPLE_WINDOW = 20
_NO_BYTES = struct.pack("<I", 0)


def _split_of(document: Document, config: StoreConfig) -> Split:
    if document.position < config.test:
        return "test"
    return "validation" if document.position < config.test + config.validation else "train"


def training_texts(config: StoreConfig, progress: Progress) -> list[str]:
    """The text the tokenizer is trained on: a sample of whole documents of the train split.

    The documents of smallest hash among the first `_SAMPLE_WINDOW` times the sample's size, so that text
    in order of date or source is sampled evenly and a stream need not be read to its end.

    Raises:
        UserError: there is none.
    """
    wanted = config.tokenizer.sample_bytes or _SAMPLE_BYTES_PER_ENTRY * config.tokenizer.vocab_size
    seen = size = 0
    kept: list[tuple[float, int, str]] = []  # a heap with the largest hash on top
    mixture = Mixture(config.sources, config.max_bytes)
    stage = f"{config.name}: sample for the tokenizer"
    progress.start(stage, unit="bytes")
    for document in mixture:
        if _split_of(document, config) != "train":
            continue
        heapq.heappush(kept, (-document.position, document.size, document.text))
        seen, size = seen + document.size, size + document.size
        while size - kept[0][1] >= wanted:
            size -= heapq.heappop(kept)[1]
        progress.advance(stage, seen)
        if seen >= _SAMPLE_WINDOW * wanted:
            break
    progress.finish(stage)
    if not kept:
        documents = sum(tally.documents for tally in mixture.tallies)
        rows = "".join(f"; {words}" for tally in mixture.tallies if (words := rows_left_out(tally)))
        raise UserError(
            f"store {config.name}: the sources hold no text{rows}"
            if documents == 0
            else f"store {config.name}: none of the {documents} documents is in the train split, so no "
            "tokenizer can be trained; lower validation and test, add text, or give tokenizer.path"
        )
    return [text for _, _, text in sorted(kept)]


def write_splits(
    config: StoreConfig,
    tokenizer: TextTokenizer,
    mixture: Mixture,
    directory: Path,
    progress: Progress,
) -> tuple[dict[Split, SplitRecord], str | None]:
    """Encode the whole mixture and write every split's files into `directory`.

    Args:
        config: says how documents are split, and whether text may spell a special token.
        tokenizer: turns the text into ids.
        mixture: the documents; it is read to its end.
        directory: where the files go; it must exist.
        progress: is told the bytes of text done.

    Returns:
        What was written, and how the first document comes back whose text is not what its tokens say.
    """
    round_trip = RoundTrip(tokenizer)
    encoders = {markup: tokenizer.encoder(markup=markup) for markup in (False, True)}
    sizes = SourceBytes(tokenizer)
    special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"(?!)")
    with contextlib.ExitStack() as stack:
        writers = {
            name: _SplitWriter(
                directory, name, tokenizer, stack, sizes if name in SCORED else None, masked=config.has_pairs
            )
            for name in SPLITS
        }
        stage = f"{config.name}: text to tokens"
        progress.start(stage, unit="bytes")
        for batch in _batches(mixture):
            ids = list(_encoded(batch, encoders))
            for document, pieces, changed in zip(batch, ids, round_trip.changed(batch, ids), strict=True):
                _refuse_marks(document, pieces, tokenizer, config.name)
                spells = _spells(document, special, config)
                writers[_split_of(document, config)].add(document, pieces, changed=changed, spells=spells)
            progress.advance(stage, sum(tally.bytes for tally in mixture.tallies))
        progress.finish(stage)
        return {name: writer.finish() for name, writer in writers.items()}, round_trip.example


def _spells(document: Document, special: re.Pattern[str], config: StoreConfig) -> bool:
    """Whether a document's text spells a special token; those that a chat template wrote are meant.

    Raises:
        UserError: it does, and the config refuses that.
    """
    found = (special.search(piece.text) for piece in document.pieces if not piece.markup)
    spelled = next((match for match in found if match is not None), None)
    if spelled is not None and config.special_tokens_in_text == "refuse":
        start = " ".join(document.text[:40].split())
        raise UserError(
            f"store {config.name}: the document that begins {start!r} spells the special token "
            f"{spelled[0]!r}; take it out, or set special_tokens_in_text: text, which encodes its letters"
        )
    return spelled is not None


def _refuse_marks(document: Document, ids: Sequence[bytes], tokenizer: TextTokenizer, store: str) -> None:
    """Refuse text of which a token is one that begins or closes documents, however the tokenizer made it."""
    marks = (tokenizer.eos_id, *tokenizer.begin_ids)
    for piece, piece_ids in zip(document.pieces, ids, strict=True):
        if not piece.markup and np.isin(np.frombuffer(piece_ids, tokenizer.dtype), marks).any():
            start = " ".join(document.text[:40].split())
            raise UserError(
                f"store {store}: the tokenizer makes a token that begins or closes documents out of text, in "
                f"the document that begins {start!r}; take it out, or choose another tokenizer.path"
            )


def _encoded(batch: Sequence[Document], encoders: Mapping[bool, Encode]) -> Iterator[list[bytes]]:
    """The ids of every piece of every document; each piece is encoded by itself."""
    pieces = [piece for document in batch for piece in document.pieces]
    ids = {
        markup: iter(encode([piece.text for piece in pieces if piece.markup is markup]))
        for markup, encode in encoders.items()
    }
    for document in batch:
        yield [next(ids[piece.markup]) for piece in document.pieces]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents with a few MB of text each, so that encoding them together pays."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the files of one split and keeps their checksums.

    Args:
        directory: where the files go.
        name: of the split.
        tokenizer: says what begins and closes a document.
        stack: closes the files.
        sizes: counts bytes of the source per token; None where nothing is scored.
        masked: whether some tokens are prompts.
    """

    def __init__(
        self,
        directory: Path,
        name: Split,
        tokenizer: TextTokenizer,
        stack: contextlib.ExitStack,
        sizes: SourceBytes | None,
        *,
        masked: bool,
    ) -> None:
        self._dtype = tokenizer.dtype
        self._begin = np.array(tokenizer.begin_ids, self._dtype).tobytes()
        self._end = np.array([tokenizer.eos_id], self._dtype).tobytes()
        self._sizes = sizes
        self._bin = _HashedFile(directory / f"{name}.bin", stack)
        self._idx = _HashedFile(directory / f"{name}.idx", stack)
        self._mask = _HashedFile(directory / f"{name}.mask", stack) if masked else None
        self._lengths = None if sizes is None else _HashedFile(directory / f"{name}.bytes", stack)
        self._documents = self._tokens = self._bytes = self._changed = self._spells = 0
        self._idx.write(struct.pack("<QQ", 0, 0))

    def add(self, document: Document, ids: Sequence[bytes], *, changed: bool, spells: bool) -> None:
        """Append one document, given the ids of its pieces, between what begins and what closes documents.

        A chat template may have written what begins a document already; it is not written twice.

        Args:
            document: the document.
            ids: of its pieces.
            changed: whether its text does not come back from them.
            spells: whether its text spells a special token.
        """
        begin = b"" if b"".join(ids).startswith(self._begin) else self._begin
        self._bin.write(b"".join((begin, *ids, self._end)))
        counts = [len(piece_ids) // len(self._end) for piece_ids in ids]
        begun = len(begin) // len(self._end)
        if self._mask is not None:
            marks = (b"\0" if piece.is_prompt else b"\1" for piece in document.pieces)
            learned = b"".join(mark * count for mark, count in zip(marks, counts, strict=True))
            self._mask.write(b"\0" * begun + learned + b"\1")  # to end is a part of the answer
        if self._lengths is not None and self._sizes is not None:
            pieces = zip(document.pieces, ids, strict=True)
            lengths = b"".join(self._lengths_of(self._sizes, piece, piece_ids) for piece, piece_ids in pieces)
            self._lengths.write(_NO_BYTES * begun + lengths + _NO_BYTES)
        self._documents += 1
        self._changed += changed
        self._spells += spells
        self._tokens += begun + sum(counts) + 1
        self._bytes += document.size
        self._idx.write(struct.pack("<QQ", self._tokens, self._bytes))

    def _lengths_of(self, sizes: SourceBytes, piece: Piece, ids: bytes) -> bytes:
        lengths_N = sizes.count(piece.text, np.frombuffer(ids, self._dtype), markup=piece.markup)
        return lengths_N.astype("<u4").tobytes()

    def finish(self) -> SplitRecord:
        """Bring everything to the disk; what was written."""
        written = [self._bin, self._idx, self._mask, self._lengths]
        files = dict(file.finish() for file in written if file is not None)
        return SplitRecord(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            changed=self._changed,
            special_tokens_in_text=self._spells,
            files=files,
        )


class _HashedFile:
    """A file whose SHA-256 is known when it has been written."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        self._file = stack.enter_context(path.open("wb"))
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> tuple[str, str]:
        """The file's name and checksum, once it is safe on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._path.name, self._hash.hexdigest()
