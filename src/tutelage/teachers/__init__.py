"""Teachers: where targets come from. One registry, one builder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.config.teacher_config import ControlTeacher, RunTeacher
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.models import hub
from tutelage.models.positions import check_length
from tutelage.teachers import live
from tutelage.teachers.live import OnlineTeacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import torch

    from tutelage.config.teacher_config import LiveTeacher, ModelTeacher
    from tutelage.data.store import Store
    from tutelage.teachers.live import Teacher

CONTROLS: dict[str, Callable[[np.ndarray, int], Teacher]] = {
    "unigram": live.unigram,
    "uniform": live.uniform,
}


def make_teacher(
    teacher: LiveTeacher, store: Store, *, runs: Path, context_length: int, device: torch.device
) -> Teacher:
    """Build a teacher that computes its targets.

    Args:
        teacher: which one.
        store: the text it will read.
        runs: directory that holds the run of a teacher of kind run.
        context_length: tokens per sequence, for its cost.
        device: where it computes.

    Raises:
        UserError: it does not exist, is unfinished, or has another tokenizer or vocabulary.
    """
    if isinstance(teacher, ControlTeacher):
        return CONTROLS[teacher.kind](store.split("train").tokens, store.vocab_size)
    path, revision = locate(teacher, runs)
    what = f"teacher {path}"
    tokenizer = check_model_tokenizer(
        what,
        path,
        store,
        revision=revision,
        assume=teacher.assume_same_tokenizer,
        setting="teacher.assume_same_tokenizer",
    )
    model = hub.load(path, revision=revision, attn_implementation=teacher.attn_implementation)
    beyond = check_length(model, what, context_length)
    notes = tokenizer.notes if beyond is None else (*tokenizer.notes, beyond)
    online = OnlineTeacher(model.to(device), hub.forward_flops(model, context_length), notes)
    tokenizer.check_rows(what, online.vocab_size, store)
    return online


def locate(teacher: RunTeacher | ModelTeacher, runs: Path) -> tuple[str, str | None]:
    """(directory or Hub name, revision) of a teacher model."""
    if not isinstance(teacher, RunTeacher):
        return teacher.path, teacher.revision
    path = runs / teacher.run / "model"
    if not path.is_dir():
        raise UserError(f"teacher run {teacher.run}: {path} does not exist; train that run to its end first")
    return str(path), None
