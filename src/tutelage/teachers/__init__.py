"""Teachers: where targets come from. One registry of kinds (`kinds.TEACHERS`), one builder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.config.teacher_config import (
    CacheTeacher,
    MeanTeacher,
    ModelTeacher,
    RunTeacher,
    TeachConfig,
)
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.kinds import TEACHERS, TeacherContext

if TYPE_CHECKING:
    from tutelage.config.teacher_config import TeacherConfig
    from tutelage.progress import Progress
    from tutelage.teachers.live import Teacher

__all__ = ["TeacherContext", "make_teacher"]


def make_teacher(config: TeacherConfig, context: TeacherContext, progress: Progress | None = None) -> Teacher:
    """Build a teacher of any kind.

    With `cache` set, what is missing of its cache is computed first: the same cache that `tutelage teach`
    writes for this store, teacher and settings. Runs that need it at the same time share the work.

    Args:
        config: which teacher.
        context: what it is for.
        progress: receives how far a cache is that has to be written first.

    Raises:
        UserError: it does not exist, is unfinished, has another tokenizer or vocabulary, cannot give what the
            objective asks for, or the disk is full.
        Stopped: on a signal to stop while a cache is written; finished shards stay.
    """
    if isinstance(config, RunTeacher | ModelTeacher | MeanTeacher) and config.cache is not None:
        alone = {} if isinstance(config, MeanTeacher) else {"dtype": "auto"}
        dtype = context.dtype if isinstance(config, MeanTeacher) or config.dtype == "auto" else config.dtype
        path = write_cache(
            TeachConfig(
                store=context.store.path,
                teacher=config.model_copy(update={"cache": None} | alone),
                context_length=context.context_length,
                document_mask=context.document_mask,
                format=config.cache.format,
                temperature=config.cache.temperature,
                dtype=dtype,
                device=context.device.type,  # type: ignore[arg-type]
                runs=context.runs,
                output=context.runs.parent / "caches",
            ),
            progress,
        )
        config = CacheTeacher(kind="cache", path=path)
    return TEACHERS[config.kind].make(config, context)
