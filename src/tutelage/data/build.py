"""Build a token store: read the sources, train or load the tokenizer, write tokens and manifest."""

from __future__ import annotations

import contextlib
import heapq
import re
import struct
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.config.data_config import FilePairs, FilesSource
from tutelage.config.load import digest
from tutelage.data.chat import load_chat
from tutelage.data.checked_files import CheckedFile
from tutelage.data.corpora import check_installed
from tutelage.data.cutting import cut_size
from tutelage.data.find_files import known_bytes, passed_over
from tutelage.data.pieces import PieceEncoder, puts_space_in_front
from tutelage.data.sources import Mixture, describe
from tutelage.data.store_manifest import (
    SCHEMA_VERSION,
    SPLITS,
    Manifest,
    SourceRecord,
    SplitRecord,
    check_splits,
    file_endings,
    read_manifest,
    rows_left_out,
)
from tutelage.data.token_text import RoundTrip, SourceBytes, is_exact
from tutelage.data.tokenizer import find_tokenizer, load_tokenizer, special_tokens, train_tokenizer
from tutelage.errors import UserError
from tutelage.files import atomic_directory, free_bytes, lock, make_directory, size_text
from tutelage.progress import NullProgress
from tutelage.records import write_manifest_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from tutelage.config.data_config import StoreConfig
    from tutelage.data.chat import Chat
    from tutelage.data.sources import Document
    from tutelage.data.tokenizer import TextTokenizer
    from tutelage.progress import Progress
    from tutelage.types import Split

_BATCH_BYTES = 4_000_000
_SAMPLE_BYTES_PER_ENTRY = 4000
_SAMPLE_WINDOW = 20


def build_store(config: StoreConfig, output: Path, progress: Progress | None = None) -> Path:
    """Build the token store of `config` in `output`, or return the one that exists already.

    The directory is `<output>/<name>-<hash8>`, where the hash covers the config without its name and the
    identity of every input. It appears only when it is complete. Memory does not grow with the text, except
    for 16 bytes and Python's overhead per document.

    Args:
        config: sources, tokenizer, split.
        output: directory of stores; created if it does not exist.
        progress: is told the bytes of text read, for the tokenizer and then for the tokens.

    Returns:
        The store's directory.

    Raises:
        UserError: a source or the tokenizer cannot be read, a split that should have text has none, or the
            disk is too small.
    """
    progress = progress or NullProgress()
    ready, chat, named = _given_tokenizer(config)
    sources = [describe(source) for source in config.sources]
    identity: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "config": _hashed(config, ready),
        "sources": sources,
        "tokenizer": ready and [ready.sha256, ready.end_of_text, *([named] if named else [])],
    }
    path = output / f"{config.name}-{digest(identity)}"
    if _is_built(path):
        return path
    _make_room(config, output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(output / f".{path.name}.lock", f"store {path}"))
        if _is_built(path):  # by another process, and a third one may be reading it by now
            return path
        partial = stack.enter_context(atomic_directory(path))
        tokenizer = ready or train_tokenizer(training_texts(config, progress), config.tokenizer.vocab_size)
        tokenizer.save(partial, named)
        mixture = Mixture(config.sources, config.max_bytes, chat)
        splits, changed_example = _write_splits(config, tokenizer, mixture, partial, progress)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=config.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=config.model_dump(mode="json"),
            vocab_size=tokenizer.vocab_size,
            dtype="uint16" if tokenizer.dtype == np.uint16 else "uint32",
            eos_id=tokenizer.eos_id,
            begin_ids=tokenizer.begin_ids,
            tokenizer_sha256=tokenizer.sha256,
            sources=_source_records(config, sources, mixture),
            ended_by=mixture.ended_by,
            changed_example=changed_example,
            splits=splits,
        )
        check_splits(config, manifest)
        write_manifest_file(partial, manifest)
    return path


def _given_tokenizer(config: StoreConfig) -> tuple[TextTokenizer | None, Chat | None, dict[str, str]]:
    """Return the ready tokenizer, its chat template and its special tokens by name, where there are any."""
    if config.tokenizer.path is None:
        return None, None, {}
    place = find_tokenizer(config.tokenizer.path)
    tokenizer = load_tokenizer(place)
    chat = load_chat(tokenizer, place) if config.uses_chat else None
    return tokenizer, chat, special_tokens(place, tokenizer) | (chat.settings if chat else {})


def _hashed(config: StoreConfig, ready: TextTokenizer | None) -> dict[str, Any]:
    """Return the settings that a store's name covers; inputs count by content and not by place."""
    fields = config.model_dump(mode="json", exclude={"name"})
    for source in fields["sources"]:
        source.pop("paths", None)
        if source.get("tools") is None:  # which stores of old could not have
            source.pop("tools", None)
    if config.tokenizer.path is not None:  # then nothing else in its section is used
        fields.pop("tokenizer")
    if config.uses_chat:
        # stores of old counted end marks between turns, or not what a tokenizer dropped in front of them
        fields["bytes"] = "of text alone" if ready and is_exact(ready) else "of all text alone"
    if ready and config.has_pairs and puts_space_in_front(ready):
        fields["pieces"] = "in order"  # stores of old have a space in front of each
    return fields


def _is_built(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def _make_room(config: StoreConfig, output: Path) -> None:
    """Make the directory of stores, unless a corpus is missing; refuse early what cannot fit there."""
    check_installed(config.sources, "sources of the store")
    make_directory(output)
    _check_space(config, output)


def _check_space(config: StoreConfig, output: Path) -> None:
    """Refuse early when the text's size is known and half a byte on disk per byte of text does not fit.

    A large vocabulary needs about half a byte, a small one up to one.
    """
    known = sum(known_bytes(source) for source in config.sources if isinstance(source, FilesSource))
    needed = min(known, config.max_bytes or known) // 2
    free = free_bytes(output)
    if needed > free:
        raise UserError(f"{output}: the store needs at least {size_text(needed)}, free are {size_text(free)}")


def _source_records(
    config: StoreConfig, described: list[dict[str, Any]], mixture: Mixture
) -> tuple[SourceRecord, ...]:
    return tuple(
        SourceRecord(
            source=identity,
            weight=source.weight,
            document_bytes=(
                cut_size(source) if isinstance(source, FilesSource) and not source.is_cut else None
            ),
            files_left_out=(
                passed_over(source.paths, source.format)
                if isinstance(source, FilesSource | FilePairs)
                else {}
            ),
            left=left,
            **asdict(tally),
        )
        for source, identity, tally, left in zip(
            config.sources, described, mixture.tallies, mixture.count_left(), strict=True
        )
    )


def training_texts(config: StoreConfig, progress: Progress) -> list[str]:
    """Return the text that the tokenizer is trained on: a sample of whole documents of the train split.

    These are the documents of smallest hash among the first `_SAMPLE_WINDOW` times the sample's size, so
    that text in order of date or source is sampled evenly and a stream need not be read to its end.

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
        left_out = (rows_left_out(tally.dropped, tally.first_bad) for tally in mixture.tallies)
        rows = "".join(f"; {words}" for words in left_out if words)
        raise UserError(
            f"store {config.name}: the sources hold no text{rows}"
            if documents == 0
            else f"store {config.name}: none of the {documents} documents is in the train split, so no "
            "tokenizer can be trained; lower validation and test, add text, or give tokenizer.path"
        )
    return [text for _, _, text in sorted(kept)]


def _split_of(document: Document, config: StoreConfig) -> Split:
    if document.position < config.test:
        return "test"
    return "validation" if document.position < config.test + config.validation else "train"


def _write_splits(
    config: StoreConfig, tokenizer: TextTokenizer, mixture: Mixture, directory: Path, progress: Progress
) -> tuple[dict[Split, SplitRecord], str | None]:
    """Encode the whole mixture and write the files of every split into `directory`.

    Returns:
        The records of the splits, and how the first document whose text does not come back is decoded.
    """
    round_trip, sizes = RoundTrip(tokenizer), SourceBytes(tokenizer)
    encoder = PieceEncoder(tokenizer)
    special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)) or r"(?!)")
    with contextlib.ExitStack() as stack:
        writers = {
            name: _SplitWriter(directory, name, tokenizer, sizes, stack, masked=config.has_pairs)
            for name in SPLITS
        }
        stage = f"{config.name}: text to tokens"
        progress.start(stage, unit="bytes")
        for batch in _batches(mixture):
            ids = list(encoder.encode([document.pieces for document in batch]))
            for document, pieces, changed in zip(batch, ids, round_trip.changed(batch, ids), strict=True):
                _refuse_marks(document, pieces, tokenizer, config)
                spells = _spells(document, special, config)
                writers[_split_of(document, config)].add(document, pieces, changed=changed, spells=spells)
            progress.advance(stage, sum(tally.bytes for tally in mixture.tallies))
        progress.finish(stage)
        return {name: writer.finish() for name, writer in writers.items()}, round_trip.example


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of documents with a few MB of text each, so that encoding them together pays."""
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


def _refuse_marks(
    document: Document, ids: Sequence[bytes], tokenizer: TextTokenizer, config: StoreConfig
) -> None:
    """Refuse text that yields a token that begins or closes documents, however the tokenizer made it."""
    marks = (tokenizer.eos_id, *tokenizer.begin_ids)
    for piece, piece_ids in zip(document.pieces, ids, strict=True):
        if not piece.markup and np.isin(np.frombuffer(piece_ids, tokenizer.dtype), marks).any():
            raise UserError(
                f"store {config.name}: the tokenizer makes a token that begins or closes documents out of "
                f"text, in the document that begins {_beginning(document)}; take it out, or choose another "
                "tokenizer.path"
            )


def _spells(document: Document, special: re.Pattern[str], config: StoreConfig) -> bool:
    """Return whether a document's text spells a special token; those of a chat template are meant.

    Raises:
        UserError: it does, and the config refuses that.
    """
    found = (special.search(piece.text) for piece in document.pieces if not piece.markup)
    spelled = next((match for match in found if match is not None), None)
    if spelled is not None and config.special_tokens_in_text == "refuse":
        raise UserError(
            f"store {config.name}: the document that begins {_beginning(document)} spells the special token "
            f"{spelled[0]!r}; take it out, or set special_tokens_in_text: text, which encodes its letters"
        )
    return spelled is not None


def _beginning(document: Document) -> str:
    return repr(" ".join(document.text[:40].split()))


class _SplitWriter:
    """Appends documents to the files of one split, which `stack` closes, and keeps their checksums."""

    def __init__(
        self,
        directory: Path,
        name: Split,
        tokenizer: TextTokenizer,
        sizes: SourceBytes,
        stack: contextlib.ExitStack,
        *,
        masked: bool,
    ) -> None:
        self._dtype = tokenizer.dtype
        self._begin = np.array(tokenizer.begin_ids, self._dtype).tobytes()
        self._end = np.array([tokenizer.eos_id], self._dtype).tobytes()
        self._sizes = sizes
        self._files = {
            ending: CheckedFile(directory / f"{name}.{ending}", stack)
            for ending in file_endings(name, masked=masked)
        }
        self._documents = self._tokens = self._bytes = self._changed = self._spells = 0
        self._files["idx"].write(struct.pack("<QQ", 0, 0))

    def add(self, document: Document, ids: Sequence[bytes], *, changed: bool, spells: bool) -> None:
        """Append one document, given the ids of its pieces, between what begins and what closes documents.

        A chat template may have written what begins a document already; it is not written twice. `changed`:
        its text does not come back from its ids; `spells`: its text spells a special token.
        """
        begin = b"" if b"".join(ids).startswith(self._begin) else self._begin
        written = b"".join((begin, *ids, self._end))
        self._files["bin"].write(written)
        begun = len(begin) // self._dtype.itemsize
        if "mask" in self._files:
            marks = (
                (b"\0" if piece.is_prompt else b"\1") * (len(piece_ids) // self._dtype.itemsize)
                for piece, piece_ids in zip(document.pieces, ids, strict=True)
            )
            self._files["mask"].write(b"\0" * begun + b"".join(marks) + b"\1")  # the end is part of an answer
        if "bytes" in self._files:
            counts = [
                self._sizes.count(piece, np.frombuffer(piece_ids, self._dtype))
                for piece, piece_ids in zip(document.pieces, ids, strict=True)
            ]
            lengths_N = np.concatenate([np.zeros(begun, np.uint32), *counts, np.zeros(1, np.uint32)])
            self._files["bytes"].write(lengths_N.astype("<u4").tobytes())
        self._documents += 1
        self._changed += changed
        self._spells += spells
        self._tokens += len(written) // self._dtype.itemsize
        self._bytes += document.size
        self._files["idx"].write(struct.pack("<QQ", self._tokens, self._bytes))

    def finish(self) -> SplitRecord:
        """Flush everything to the disk and return what was written."""
        return SplitRecord(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            changed=self._changed,
            special_tokens_in_text=self._spells,
            files={k: v for file in self._files.values() for k, v in file.finish().items()},
        )
