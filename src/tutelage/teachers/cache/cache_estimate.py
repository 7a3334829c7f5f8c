"""Estimates of a cache's size and time in every format, from a trial on two of its batches."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from tutelage.config.teacher_config import (
    Format,
    HiddenFormat,
    MinVarianceFormat,
    MultinomialFormat,
    TopKFormat,
)
from tutelage.files import free_bytes
from tutelage.teachers.cache.codec import CodecSettings
from tutelage.teachers.cache.formats import make_codec
from tutelage.teachers.cache.job import load_job, plan_cache
from tutelage.teachers.cache.shard import INDEX_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.config.teacher_config import TeachConfig
    from tutelage.teachers.cache.job import CacheJob
    from tutelage.types import Batch, WholeTargets

_TRIALS = 2


@dataclass(frozen=True, slots=True)
class FormatEstimate:
    """Size and time of a cache in one format.

    Attributes:
        format: with its parameters.
        bytes_per_token: as stored, index included.
        total_bytes: of the whole cache, head included.
        seconds: of teacher and codec one after the other, alone on this machine; they overlap, so it can
            be less.
        configured: whether this is the format of the config.
    """

    format: Format
    bytes_per_token: float
    total_bytes: float
    seconds: float
    configured: bool

    @property
    def label(self) -> str:
        """Kind and parameters, for a table."""
        fields = self.format.model_dump(exclude={"kind"})
        return " ".join([self.format.kind, *(f"{name}={value}" for name, value in fields.items())])


@dataclass(frozen=True, slots=True)
class CacheEstimate:
    """Size and time of a cache, and what there is for it.

    Attributes:
        path: where it would be written.
        tokens: positions to cover.
        teacher_flops: of all forward passes.
        free_bytes: on the disk it would be written to.
        trial_tokens: positions that bytes and time were measured on.
        formats: the configured one first.
    """

    path: Path
    tokens: int
    teacher_flops: float
    free_bytes: int
    trial_tokens: int
    formats: tuple[FormatEstimate, ...]


def estimate_cache(config: TeachConfig) -> CacheEstimate:
    """Load the teacher, run two of its batches, and encode them in every format. Writes nothing.

    Raises:
        UserError: the config is wrong, as `write_cache` would say.
    """
    job = load_job(plan_cache(config))
    layout = job.manifest.layout
    # Batches from different parts of the text, or the first ones where there is only one shard.
    shards = sorted({trial * layout.shards // _TRIALS for trial in range(_TRIALS)})
    batches = [batch for shard in shards for batch in islice(job.batches(shard), _TRIALS // len(shards))]
    job.targets(batches[0])  # the first call pays for set-up
    trials, forward = [], 0.0
    for batch in batches:
        start = time.perf_counter()
        targets = job.targets(batch)
        if job.device.type != "cpu":
            torch.accelerator.synchronize()  # so that the clock includes its work
        forward += time.perf_counter() - start
        trials.append((targets, batch))
    return CacheEstimate(
        path=job.plan.path,
        tokens=layout.positions,
        teacher_flops=layout.positions * job.teacher.forward_flops,
        free_bytes=free_bytes(config.output),
        trial_tokens=sum(batch.tokens_BT.numel() for batch in batches),
        formats=tuple(_try_format(job, choice, trials, forward) for choice in _choices(job)),
    )


def _choices(job: CacheJob) -> list[Format]:
    """The configured format, then usual ones of every kind."""
    vocab_size = job.manifest.vocab_size
    usual: list[Format] = [
        MinVarianceFormat(ids=min(16, vocab_size)),
        MultinomialFormat(kind="sample_multinomial"),
        TopKFormat(kind="topk", k=min(12, vocab_size)),
        TopKFormat(kind="topk", k=min(50, vocab_size)),
        HiddenFormat(kind="hidden", dtype="int8"),
        HiddenFormat(kind="hidden", dtype="float16"),
        HiddenFormat(kind="hidden", dtype="float32"),
    ]
    configured = job.manifest.format
    if not job.head:  # of a mean of teachers
        usual = [choice for choice in usual if not isinstance(choice, HiddenFormat)]
    return [configured, *(choice for choice in usual if choice != configured)]


def _try_format(
    job: CacheJob, choice: Format, trials: list[tuple[WholeTargets, Batch]], forward: float
) -> FormatEstimate:
    manifest = job.manifest.model_copy(update={"format": choice})
    tried = replace(job, manifest=manifest, codec=make_codec(choice, CodecSettings.of(manifest)))
    size = tokens = 0
    start = time.perf_counter()
    for targets, batch in trials:
        blocks, positions = tried.encoded(targets, batch)
        size += sum(len(block) + INDEX_BYTES for block, _ in blocks)
        tokens += positions
    seconds = forward + time.perf_counter() - start
    positions = manifest.layout.positions
    return FormatEstimate(
        format=choice,
        bytes_per_token=size / tokens,
        total_bytes=size / tokens * positions + tried.head_bytes,
        seconds=seconds / tokens * positions,
        configured=choice == job.manifest.format,
    )
