"""The manifest of a teacher cache, and where the targets of a token position lie in its files.

A cache is a directory: `manifest.json`, `shards/NNNNNN.bin` and, for hidden states, `head.safetensors`. It
covers every position of the train split that has a next token. The manifest is written once, before the first
shard, and says what the shards hold; a shard is finished when its file exists under its name.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tutelage.config.base import MOST_TOKENS, BatchTokens, Length
from tutelage.config.teacher_config import Format
from tutelage.records import Record, read_manifest_file
from tutelage.types import LogitTransform

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.config.teacher_config import TeachConfig

SCHEMA_VERSION = 3
"""Raised when the files of a cache change. It is part of a cache's name, so old ones are not continued.
1: the manifest listed the finished shards with a checksum of each. 2: it said nothing of a document
mask and had no seal."""

MANIFEST_FILE = "manifest.json"
HEAD_FILE = "head.safetensors"
WRITERS = "`tutelage teach` (or the run or study that keeps it)"
"""What writes a cache and what is missing of it, for messages."""


class TeacherRecord(Record, extra="forbid"):
    """The teacher of a cache.

    Attributes:
        kind: as in the config: run, model, mean, or the name of a control.
        id: run id, path or Hub name, as it was first given.
        fingerprint: identity of its weights: SHA-256 of a model directory, name@commit on the Hub.
        forward_flops: FLOPs of its forward pass per token.
        notes: what the user should know about it, for example what was assumed.
        attn_implementation: how it computed attention, where that was chosen.
        parts: kind and id of each teacher that a mean is of.
    """

    kind: str
    id: str
    fingerprint: str
    forward_flops: float
    notes: tuple[str, ...] = ()
    attn_implementation: str | None = None
    parts: tuple[tuple[str, str], ...] = ()


class Layout(Record, extra="forbid"):
    """Where positions lie.

    A block holds the context [w T, (w + 1) T) that the teacher saw at once; the last one may be shorter. A
    shard holds the blocks that one writer computes at a time.

    Attributes:
        positions: positions covered, from 0.
        context_length: T, positions per block.
        contexts_per_shard: blocks per shard.
    """

    positions: int = Field(ge=1, le=MOST_TOKENS)
    context_length: Length
    contexts_per_shard: int = Field(ge=1, le=MOST_TOKENS)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.positions // self.context_length)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.blocks // self.contexts_per_shard)

    def block_tokens(self, block: int) -> int:
        """Positions of a block: T, or the rest for the last one."""
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


class CacheManifest(Record, extra="forbid"):
    """Everything about a cache but the targets. No date, place or machine: equal caches are equal bytes.

    Fields that are not listed here are those of `TeachConfig`.

    Attributes:
        vocab_size: token ids of the store; padded rows of the teacher's head are left out.
        width: of the teacher's hidden states.
        transform: what the teacher does to its logits.
        store: fingerprint of the token store.
        head_sha256: checksum of head.safetensors; None where the format needs no head.
    """

    schema_version: int
    teacher: TeacherRecord
    vocab_size: int = Field(ge=1, le=2**24)
    width: int = Field(ge=0, le=2**24)
    transform: LogitTransform
    document_mask: bool
    dtype: Literal["float32", "bfloat16"]
    store: str
    split: Literal["train"]
    layout: Layout
    batch_tokens: BatchTokens
    format: Format
    temperature: float
    seed: int
    compress: bool
    head_sha256: str | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what determines the targets; name, place, shards and compression do not count."""
        teacher = self.teacher.fingerprint, self.teacher.attn_implementation
        return targets_fingerprint(self, self.store, self.layout.context_length, *teacher)


def targets_fingerprint(
    settings: CacheManifest | TeachConfig,
    store: str,
    context_length: int,
    teacher: str,
    attn_implementation: str | None,
) -> str:
    """The `fingerprint` of a cache with these settings, store, context length and teacher."""
    names = {"document_mask", "dtype", "format", "temperature", "seed"}
    content = settings.model_dump(mode="json", include=names)
    content |= {"store": store, "split": "train", "teacher": teacher, "context_length": context_length}
    if attn_implementation is not None:
        content["attn_implementation"] = attn_implementation
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_cache_manifest(cache: Path) -> CacheManifest:
    """Read and check the manifest of the teacher cache in the directory `cache`.

    Raises:
        UserError: it is missing, is no manifest of a cache, or has another schema version.
    """
    return read_manifest_file(
        cache,
        CacheManifest,
        version=SCHEMA_VERSION,
        field="teacher",
        what="teacher cache",
        remedy=WRITERS,
    )
