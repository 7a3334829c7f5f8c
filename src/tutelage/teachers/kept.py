"""A teacher whose targets are kept: the cache that its students share, computed by whoever is first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tutelage.teachers.config import TeachConfig
from tutelage.teachers.writer import write_cache

if TYPE_CHECKING:
    from pathlib import Path

    from tutelage.config import ModelTeacher, RunConfig, RunTeacher


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
