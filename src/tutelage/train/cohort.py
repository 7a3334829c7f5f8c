"""Which runs can train together: those that read the same batches and have one teacher, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.config import CacheTeacher
from tutelage.errors import UserError
from tutelage.teachers.cached import check_serves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config import RunConfig


def check_cohort(configs: Sequence[RunConfig]) -> None:
    """Check that runs can train together, and that their teacher's targets serve each of them.

    Raises:
        UserError: naming the first field that they must share and do not, or what one asks for in vain.
    """
    first = configs[0]
    for other in configs[1:]:
        for field, ours, theirs in (
            ("data", first.data, other.data),
            ("global_batch_tokens", first.global_batch_tokens, other.global_batch_tokens),
            ("micro_batch_tokens", first.micro_batch_tokens, other.micro_batch_tokens),
            ("dtype", first.dtype, other.dtype),
            ("runtime.device", first.runtime.device, other.runtime.device),
            ("runtime.threads", first.runtime.threads, other.runtime.threads),
            ("output", first.output, other.output),
        ):
            if ours != theirs:
                raise UserError(
                    f"runs {first.name} and {other.name}: trained together, they read the same batches, but "
                    f"{field} is {ours} in one and {theirs} in the other; make them equal or train one by one"
                )
    teachers = [config.teacher for config in configs if config.teacher is not None]
    for teacher in teachers[1:]:
        if teacher != teachers[0]:
            raise UserError(
                f"teacher: runs trained together share one, but there are {teachers[0]} and {teacher}; "
                "train them in one cohort per teacher"
            )
    for config in configs:
        if isinstance(config.teacher, CacheTeacher):
            check_serves(config.teacher.path, config.objective)
