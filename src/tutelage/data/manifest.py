"""The record that makes a directory a token store: `manifest.json`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from tutelage.errors import UserError
from tutelage.manifests import ManifestHead, ManifestRecord, read_manifest_file
from tutelage.types import Split

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION = 2
"""Raised when what a build writes changes. It is part of a store's name, so old stores are not reused."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

SCORED: tuple[Split, Split] = ("validation", "test")
"""Splits that are scored: choices and fits are made on the first, results are reported on the second."""


class SplitRecord(ManifestRecord):
    """One split.

    Attributes:
        documents: number of documents.
        tokens: ids in `<split>.bin`, with what begins and closes each document.
        bytes: UTF-8 bytes of the documents' text.
        changed: documents whose text does not come back from their tokens.
        special_tokens_in_text: documents whose text (not a chat template) spells a special token, which is
            encoded as the letters it is.
        files: SHA-256 of each file, by name: `<split>.bin`, `<split>.idx`, in a store with prompts
            `<split>.mask`, and of a split that is scored `<split>.bytes`.
    """

    documents: int
    tokens: int
    bytes: int
    changed: int
    special_tokens_in_text: int
    files: dict[str, str]


class LeftRecord(ManifestRecord):
    """What the mixture did not take of a source because another one ran out.

    Attributes:
        documents: documents left.
        bytes: their bytes of UTF-8.
        is_all: whether that is everything; otherwise counting ended there.
    """

    documents: int
    bytes: int
    is_all: bool


class SourceRecord(ManifestRecord):
    """One source: what fixed its text, what was taken of it, and what was not.

    Attributes:
        source: versions, licence, checksums.
        weight: share of bytes that was asked for; None: everything.
        documents: documents taken.
        bytes: their bytes of UTF-8.
        dropped: rows left out, by reason: null, blank, duplicate, bad.
        first_bad: what was wrong with the first bad one.
        document_bytes: about how long the documents are that text files were cut into; None: no cuts.
        left: what was left when another source ended the mixture; None where nothing was or it is not known.
    """

    source: dict[str, JsonValue]
    weight: float | None
    documents: int
    bytes: int
    dropped: dict[str, int]
    first_bad: str | None
    document_bytes: int | None
    left: LeftRecord | None


class Manifest(ManifestRecord):
    """Everything about a store but the tokens.

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
    name: str
    created: str
    config: dict[str, JsonValue]
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    eos_id: int
    begin_ids: tuple[int, ...]
    tokenizer_sha256: str
    sources: tuple[SourceRecord, ...]
    ended_by: int | Literal["max_bytes"] | None
    changed_example: str | None
    splits: dict[Split, SplitRecord]

    @property
    def masked(self) -> bool:
        """Whether there are prompts, whose tokens carry no loss."""
        return any(f"{name}.mask" in record.files for name, record in self.splits.items())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over tokenizer, tokens, mask and bytes per token: the same for equal content anywhere."""
        checksums = [self.tokenizer_sha256]
        for name in SPLITS:
            files = self.splits[name].files
            checksums += [files[f"{name}.{ending}"] for ending in _endings(self, name)]
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()


def read_manifest(store: Path) -> Manifest:
    """Read and check the manifest of the token store in the directory `store`.

    Raises:
        UserError: it is missing, is no manifest, or has another schema version.
    """
    manifest = read_manifest_file(
        store, Manifest, ManifestHead, SCHEMA_VERSION, "token store", "tutelage data build"
    )
    _check_complete(store / "manifest.json", manifest)
    return manifest


def _endings(manifest: Manifest, split: Split) -> tuple[str, ...]:
    masks = ("mask",) if manifest.masked else ()
    return ("bin", "idx", *masks, *(("bytes",) if split in SCORED else ()))


def _check_complete(path: Path, manifest: Manifest) -> None:
    for name in SPLITS:
        files = manifest.splits[name].files if name in manifest.splits else {}
        if set(files) != {f"{name}.{ending}" for ending in _endings(manifest, name)}:
            raise UserError(
                f"{path}: not the manifest of a token store (splits.{name} is missing or incomplete)"
            )
