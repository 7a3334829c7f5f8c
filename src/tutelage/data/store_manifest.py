"""The manifest of a token store, and remarks on what was left out, cut or changed when it was built."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue

from tutelage.config.base import Name
from tutelage.config.data_config import FilesSource
from tutelage.errors import UserError
from tutelage.records import Record, read_manifest_file
from tutelage.types import Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tutelage.config.data_config import StoreConfig

SCHEMA_VERSION = 3
"""Raised when what a build writes changes. It is part of a store's name, so old stores are not reused."""

Count = Annotated[int, Field(ge=0, le=2**60)]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SCORED: tuple[Split, Split] = ("validation", "test")
"""Splits that are scored: choices and fits are made on the first, results are reported on the second."""


def file_endings(split: Split, *, masked: bool) -> tuple[str, ...]:
    """Return the endings of the files of `split`, in order; `masked`: the store has prompts."""
    return ("bin", "idx", *(("mask",) if masked else ()), *(("bytes",) if split in SCORED else ()))


class SplitRecord(Record, extra="forbid"):
    """One split.

    Attributes:
        documents: number of documents.
        tokens: ids in `<split>.bin`, with what begins and closes each document.
        bytes: UTF-8 bytes of the documents' text.
        changed: documents whose text does not come back from their tokens.
        special_tokens_in_text: documents whose text (not a chat template) spells a special token, which is
            encoded as the letters it is.
        files: SHA-256 of each file, by name: `<split>.bin`, `<split>.idx`, in a store with prompts
            `<split>.mask`, of a split that is scored `<split>.bytes`, and the `.crc32` of each of these.
    """

    documents: Count
    tokens: Count
    bytes: Count
    changed: Count
    special_tokens_in_text: Count
    files: dict[str, str]


class Left(Record, extra="forbid"):
    """The part of a source that the mixture did not take because another one ran out.

    Attributes:
        documents: documents left.
        bytes: their bytes of UTF-8.
        is_all: whether this is everything; otherwise counting ended here.
    """

    documents: int
    bytes: int
    is_all: bool


class SourceRecord(Record, extra="forbid"):
    """One source: the identity of its text, what was taken of it, and what was not.

    Attributes:
        source: versions, licence, checksums.
        weight: share of bytes in the mixture; None: everything.
        documents: documents taken.
        bytes: their bytes of UTF-8.
        dropped: rows left out, by reason: null, blank, duplicate, bad.
        first_bad: error of the first bad one.
        document_bytes: about how long the documents are that text files were cut into; None: no cuts, or
            cuts at marks in the text.
        files_left_out: files of its directories that were not read, by ending or reason.
        left: the rest when another source ended the mixture; None where nothing was left or it is not known.
    """

    source: dict[str, JsonValue]
    weight: float | None
    documents: int
    bytes: int
    dropped: dict[str, int]
    first_bad: str | None
    document_bytes: int | None
    files_left_out: dict[str, int] = Field(default_factory=dict)
    left: Left | None


class Manifest(Record, extra="forbid"):
    """Everything about a store except the tokens.

    Attributes:
        schema_version: layout of the files.
        name: readable part of the directory's name.
        created: UTC time of the build; no hash depends on it.
        config: the config it was built from.
        vocab_size: one more than the largest id the tokenizer knows.
        dtype: little-endian type of the ids in the .bin files.
        eos_id: the id that closes every document.
        begin_ids: the ids that begin every document: what the tokenizer puts in front of a text.
        tokenizer_sha256: checksum of tokenizer.json.
        sources: one record per source of the config, in its order.
        ended_by: what ended the mixture: "max_bytes", or the place of the source that ran out before others
            did; None where every source was read to its end.
        changed_example: how one of the documents counted as `changed` comes back.
        splits: train, validation and test.
    """

    schema_version: int
    name: Name
    created: str
    config: dict[str, JsonValue]
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    dtype: Literal["uint16", "uint32"]
    eos_id: Count
    begin_ids: tuple[Count, ...]
    tokenizer_sha256: str
    sources: tuple[SourceRecord, ...] = Field(min_length=1)
    ended_by: int | Literal["max_bytes"] | None
    changed_example: str | None
    splits: dict[Split, SplitRecord]

    @property
    def masked(self) -> bool:
        """Whether the store has prompts, whose tokens carry no loss."""
        return any(f"{name}.mask" in record.files for name, record in self.splits.items())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokenizer, tokens, mask and bytes per token: the same for equal content anywhere."""
        checksums = [self.tokenizer_sha256]
        for name in SPLITS:
            files = self.splits[name].files
            checksums += [files[f"{name}.{ending}"] for ending in file_endings(name, masked=self.masked)]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()


def read_manifest(store: Path) -> Manifest:
    """Read and check the manifest of the token store in the directory `store`.

    Raises:
        UserError: it is missing, is no manifest, or has another schema version.
    """
    manifest = read_manifest_file(
        store,
        Manifest,
        version=SCHEMA_VERSION,
        field="sources",
        what="token store",
        remedy="`tutelage data build`",
    )
    _check_complete(store / "manifest.json", manifest)
    return manifest


def _check_complete(path: Path, manifest: Manifest) -> None:
    if isinstance(manifest.ended_by, int) and manifest.ended_by not in range(len(manifest.sources)):
        raise UserError(f"{path}: not the manifest of a token store (ended_by names no source)")
    for name in SPLITS:
        files = manifest.splits[name].files if name in manifest.splits else {}
        endings = [x for end in file_endings(name, masked=manifest.masked) for x in (end, f"{end}.crc32")]
        if set(files) != {f"{name}.{ending}" for ending in endings}:
            raise UserError(
                f"{path}: not the manifest of a token store (splits.{name} is missing or incomplete)"
            )


_NO_SHARE = 1e-9  # what rounding leaves of nothing


def source_name(source: dict[str, JsonValue]) -> str:
    """Name a source for people: its corpus, data set, or first file and the number of others."""
    match source:
        case {"kind": "hub" | "hub_pairs", "path": str(path)}:
            return path
        case {"files": [{"name": str(first)}, *more]}:
            return f"{first} and {len(more)} more" if more else first
        case {"name": str(name)}:
            return name
    return str(source.get("kind"))


def remarks(manifest: Manifest) -> list[str]:
    """Return a line for each unusual thing: rows left out, files cut, how the mixture ended, changed text."""
    numbered = list(enumerate(manifest.sources, 1))
    lines = [line for number, record in numbered for line in _of_source(f"source {number}", record)]
    lines += _of_mixture(manifest)
    spelled = sum(record.special_tokens_in_text for record in manifest.splits.values())
    if spelled:
        lines.append(
            f"{spelled:,} documents spell a special token of the tokenizer: text here, the token itself to "
            "other programs that encode them"
        )
    match manifest.config.get("tokenizer"):
        case {"path": None, "vocab_size": int(wanted)} if manifest.vocab_size < wanted:
            lines.append(
                f"the tokenizer has {manifest.vocab_size:,} entries of the {wanted:,} that were asked for "
                "(tokenizer.vocab_size): the text that it learned from has no more"
            )
    changed = not_comparable(manifest)
    return [*lines, *([changed] if changed else [])]


def not_comparable(manifest: Manifest) -> str | None:
    """Say why bits per byte of a store do not compare across tokenizers; None if they do."""
    records = manifest.splits.values()
    changed, documents = (sum(record.changed for record in records), sum(r.documents for r in records))
    if changed == 0:
        return None
    return (
        f"the tokenizer changes the text of {changed:,} of {documents:,} documents (for example "
        f"{manifest.changed_example}), so bits per byte compare only with those of the same tokenizer"
    )


def check_splits(config: StoreConfig, manifest: Manifest) -> None:
    """Raise `UserError` if a split that should have a share of the text is empty."""
    documents = sum(record.documents for record in manifest.splits.values())
    shares = {
        "train": 1.0 - config.validation - config.test,
        "validation": config.validation,
        "test": config.test,
    }
    empty = [
        name for name, record in manifest.splits.items() if shares[name] > _NO_SHARE and record.documents == 0
    ]
    known = "".join(f"; {line}" for line in remarks(manifest))
    if documents == 0:
        raise UserError(f"store {config.name}: the sources hold no text{known}")
    if empty:
        files = any(isinstance(source, FilesSource) for source in config.sources)  # the one kind that is cut
        cut = "cut text into more of them (document_bytes: 512, cut_at or cut_before of its files), "
        more = "add text" if config.max_bytes is None else "add text or raise max_bytes"
        ways = (cut if files else "") + more
        raise UserError(
            f"store {config.name}: split '{empty[0]}' is empty: its share is {shares[empty[0]]:.2g}, and the "
            f"documents are {documents:,}; {ways}, raise the share, or set it to 0{known}"
        )


def rows_left_out(dropped: Mapping[str, int], first_bad: str | None) -> str:
    """Say how many rows of a source are not used for which reason; "" if all are."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    first = f"; the first bad one: {first_bad}" if first_bad else ""
    return f"rows left out: {counts}{first}" if counts else ""


def _of_source(number: str, record: SourceRecord) -> Iterator[str]:
    name = f"{number} ({source_name(record.source)})"
    left_out = rows_left_out(record.dropped, record.first_bad)
    if left_out:
        yield f"{name}: {left_out}"
    if record.documents == 0:
        yield f"{name}: nothing was taken of it"
    if record.files_left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in record.files_left_out.items())
        yield f"{name}: files of its directories that were not read: {counts}"
    files = record.source.get("files")
    rows = record.documents + sum(record.dropped.values())
    if record.document_bytes is not None and isinstance(files, list) and rows > len(files):
        yield f"{name}: long text files are cut into documents of about {record.document_bytes:,} bytes"


def _of_mixture(manifest: Manifest) -> Iterator[str]:
    if manifest.ended_by == "max_bytes":
        limit = manifest.config.get("max_bytes")
        shown = f"{limit:,}" if isinstance(limit, int) else limit
        yield f"reading ended at max_bytes = {shown}; what comes after was not read"
    elif manifest.ended_by is not None:
        ended = manifest.ended_by
        rest = [
            f"{_amount(record.left)} of source {number} ({source_name(record.source)})"
            for number, record in enumerate(manifest.sources, 1)
            if number != ended + 1 and (record.left is None or record.left.documents)
        ]
        if rest:
            yield (
                f"the mixture ended when source {ended + 1} ({source_name(manifest.sources[ended].source)}) "
                f"ran out; not used: {', '.join(rest)}"
            )


def _amount(left: Left | None) -> str:
    if left is None:
        return "an unknown rest"
    return f"{'' if left.is_all else 'more than '}{left.documents:,} documents ({left.bytes:,} bytes)"
