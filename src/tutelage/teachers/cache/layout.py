"""The record that makes a directory a teacher cache: `manifest.json`, and where each position lies.

A cache is a directory: `manifest.json`, `shards/NNNNNN.bin` and, for hidden states, `head.safetensors`.
It covers every position of the train split that has a next token. Context w is what the teacher saw at
once, positions [w T, (w + 1) T); the last one may be shorter. A context is one block of bytes, and a shard
is the blocks of as many contexts as one writer claims at a time.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal

from tutelage.config.teacher_config import Format
from tutelage.errors import UserError
from tutelage.manifests import ManifestHead, ManifestRecord, read_manifest_file
from tutelage.types import LogitTransform

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION = 1
"""Raised when the bytes of a cache change. It is part of a cache's name, so old ones are not continued."""


class TeacherRecord(ManifestRecord):
    """Who taught.

    Attributes:
        kind: as in the config: run, model, or the name of a control.
        id: run id, path or Hub name, as it was first given.
        fingerprint: what fixes its weights: SHA-256 of a model directory, name@commit on the Hub.
        forward_flops: FLOPs of its forward pass per token.
        notes: what the user should know about it, for example what was assumed.
    """

    kind: str
    id: str
    fingerprint: str
    forward_flops: float
    notes: tuple[str, ...] = ()


class ShardRecord(ManifestRecord):
    """One finished shard.

    Attributes:
        file: its path in the cache.
        first: its first position.
        tokens: number of its positions.
        bytes: size of the file.
        index_sha256: checksum of its index, which holds a checksum for every block.
    """

    file: str
    first: int
    tokens: int
    bytes: int
    index_sha256: str


class Layout(ManifestRecord):
    """Where positions lie.

    Attributes:
        positions: positions covered, from 0.
        context_length: T, positions per block.
        contexts_per_shard: blocks per shard.
    """

    positions: int
    context_length: int
    contexts_per_shard: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.positions // self.context_length)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.blocks // self.contexts_per_shard)

    def block_tokens(self, block: int) -> int:
        """Positions of a block: T, or what is left for the last one."""
        return min(self.context_length, self.positions - block * self.context_length)

    def blocks_of(self, shard: int) -> range:
        """Blocks of a shard."""
        first = shard * self.contexts_per_shard
        return range(first, min(first + self.contexts_per_shard, self.blocks))

    def positions_of(self, shard: int) -> range:
        """Positions of a shard."""
        blocks = self.blocks_of(shard)
        first = blocks.start * self.context_length
        return range(first, min(blocks.stop * self.context_length, self.positions))

    def file(self, shard: int) -> str:
        """Path of a shard in the cache."""
        return f"shards/{shard:06d}.bin"


class CacheManifest(ManifestRecord):
    """Everything about a cache but the targets. No date, place or machine: equal caches are equal bytes.

    Attributes:
        schema_version: layout of the files.
        teacher: whose targets these are.
        vocab_size: token ids of the store; padded rows of the teacher's head are left out.
        width: of the teacher's hidden states.
        transform: what the teacher does to its logits.
        dtype: the teacher's compute type.
        store: fingerprint of the token store.
        split: which of its splits.
        layout: where positions lie.
        batch_tokens: tokens per teacher forward.
        format: what is kept of the distributions.
        temperature: T of the kept probabilities.
        seed: of the sampler.
        compress: whether blocks may be zstd frames.
        head_sha256: checksum of head.safetensors; None where there is none.
        shards: the finished ones, in order.
    """

    schema_version: int
    teacher: TeacherRecord
    vocab_size: int
    width: int
    transform: LogitTransform
    dtype: Literal["float32", "bfloat16"]
    store: str
    split: Literal["train"]
    layout: Layout
    batch_tokens: int
    format: Format
    temperature: float
    seed: int
    compress: bool
    head_sha256: str | None
    shards: tuple[ShardRecord, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what determines the targets; name, place, shards and compression do not count."""
        content = self.model_dump(
            mode="json",
            include={"store", "split", "dtype", "format", "temperature", "seed"},
        ) | {"teacher": self.teacher.fingerprint, "context_length": self.layout.context_length}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def finished(self) -> bool:
        """Whether every shard is there."""
        return len(self.shards) == self.layout.shards

    @property
    def bytes(self) -> int:
        """Size of the finished shards."""
        return sum(record.bytes for record in self.shards)

    def text(self) -> str:
        """The content of manifest.json."""
        return self.model_dump_json(indent=2) + "\n"


def read_cache_manifest(cache: Path) -> CacheManifest:
    """Read and check the manifest of the teacher cache in the directory `cache`.

    Raises:
        UserError: it is missing, is no manifest of a cache, or has another schema version.
    """
    manifest = read_manifest_file(
        cache, CacheManifest, _Head, SCHEMA_VERSION, "teacher cache", "tutelage teach"
    )
    _check_shards(cache / "manifest.json", manifest)
    return manifest


def cache_fingerprint(cache: Path) -> str:
    """Identity of the targets in a cache, from its manifest alone; the same wherever the cache lies.

    Raises:
        UserError: as `read_cache_manifest`.
    """
    return read_cache_manifest(cache).fingerprint


class _Head(ManifestHead):
    teacher: object  # a token store has a schema version too


def _check_shards(path: Path, manifest: CacheManifest) -> None:
    """Every record must be where the layout puts it."""
    layout = manifest.layout
    places = {layout.file(shard): layout.positions_of(shard) for shard in range(layout.shards)}
    files = [record.file for record in manifest.shards]
    if files != sorted(set(files)) or any(
        record.file not in places or range(record.first, record.first + record.tokens) != places[record.file]
        for record in manifest.shards
    ):
        raise UserError(f"{path}: not the manifest of a teacher cache (shards do not fit the layout)")
