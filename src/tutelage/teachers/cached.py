"""A teacher whose targets are kept: the cache that its students share, computed by whoever is first."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from tutelage.config.teacher_config import HiddenFormat, TeachConfig, incompatibility
from tutelage.errors import UserError
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.codec import HiddenRows
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import open_cache
from tutelage.types import Batch, DenseTargets, SparseTargets, Targets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from tutelage.config.objective_config import ObjectiveConfig
    from tutelage.config.teacher_config import Format
    from tutelage.data.store import Store
    from tutelage.teachers.cache.codec import Rows
    from tutelage.teachers.cache.reader import Cache

    Key = tuple[tuple[int, ...], int]
    from tutelage.config.run_config import RunConfig
    from tutelage.config.teacher_config import ModelTeacher, RunTeacher


class CachedTeacher:
    """Targets by token position. What the next step needs is fetched by a thread during this one.

    Args:
        cache: an opened cache that fits the store and the sequence length.
        device: where the targets are wanted.
    """

    forward_flops = 0.0

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.vocab_size = cache.manifest.vocab_size
        self.kept: Format | None = cache.manifest.format
        self.notes = cache.manifest.teacher.notes
        self._cache = cache
        self._device = device
        self._head_VE: Tensor | None = None
        self._bias_V: Tensor | None = None
        if isinstance(cache.manifest.format, HiddenFormat):
            head_VE, _, bias_V = cache.head()
            self._head_VE = head_VE.to(device)
            self._bias_V = None if bias_V is None else bias_V.to(device)
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._expected: dict[Key, Future[Rows]] = {}

    def expect(self, batches: Sequence[Batch]) -> None:
        """Start to fetch what `targets` will be asked for after the current step."""
        for key in list(self._expected)[: -len(batches)]:  # a step that did not ask for its targets
            del self._expected[key]
        for batch in batches:
            key = _key(batch)
            self._expected[key] = self._fetcher.submit(self._cache.read, *key)

    def targets(self, batch: Batch) -> Targets:
        """The cached targets of all positions of `batch`, on the training device.

        Raises:
            UserError: a block of the cache is damaged; the message names file and range.
        """
        key = _key(batch)
        fetched = self._expected.pop(key, None)
        rows = fetched.result() if fetched is not None else self._cache.read(*key)
        if isinstance(rows, HiddenRows):
            assert self._head_VE is not None  # noqa: S101 - hidden rows come with a head
            hidden_NE = rows.hidden_NE.to(self._device, self._head_VE.dtype)
            return DenseTargets(hidden_NE, self._head_VE, self._cache.manifest.transform, self._bias_V)
        return SparseTargets(
            rows.ids_NK.to(self._device),
            rows.probs_NK.to(self._device),
            rows.tail_N.to(self._device),
            rows.gold_logp_N.to(self._device),
            rows.temperature,
        )


def cached_teacher(
    path: Path, store: Store, sequence_length: int, objective: ObjectiveConfig, device: torch.device
) -> CachedTeacher:
    """Open a cache as a teacher and check that it serves this run.

    Raises:
        UserError: it is unfinished, belongs to other text, or cannot give what the objective asks for.
    """
    cache = open_cache(path)
    cache.check_fits(store, sequence_length)
    check_serves(path, objective)
    return CachedTeacher(cache, device)


def check_serves(path: Path, objective: ObjectiveConfig) -> None:
    """Raise UserError if a cache cannot give what an objective asks for."""
    manifest = read_cache_manifest(path)
    reason = incompatibility(manifest.format, manifest.temperature, objective, str(path))
    if reason is not None:
        raise UserError(reason)


def _key(batch: Batch) -> Key:
    return batch.starts, batch.tokens_BT.shape[1]


def kept_targets(
    config: RunConfig, teacher: RunTeacher | ModelTeacher, dtype: Literal["float32", "bfloat16"]
) -> Path:
    """The cache of the teacher of `config`, which asks for one; what is missing of it is computed.

    It is the cache that `tutelage teach` writes for the same store, teacher and settings. Runs that need it
    at the same time share the work.

    Args:
        config: the student's run.
        teacher: its teacher, with `cache` set.
        dtype: compute type of the teacher.

    Returns:
        The cache's directory, in `caches` beside the run directories' own.

    Raises:
        UserError: the teacher is missing or does not fit the store, or the disk is full.
        Stopped: on SIGINT or SIGTERM; what is finished stays.
    """
    assert teacher.cache is not None  # noqa: S101 - what the caller asks for
    return write_cache(
        TeachConfig(
            store=config.data.store,
            teacher=teacher.model_copy(update={"cache": None}),
            context_length=config.data.sequence_length,
            format=teacher.cache.format,
            temperature=teacher.cache.temperature,
            dtype=dtype,
            device=config.runtime.device,
            threads=config.runtime.threads,
            runs=config.output,
            output=config.output.parent / "caches",
        )
    )
