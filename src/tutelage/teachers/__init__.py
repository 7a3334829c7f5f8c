"""Teachers: where targets come from. One registry, one builder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from tutelage.config import ControlTeacher, RunTeacher
from tutelage.errors import UserError
from tutelage.models import hub
from tutelage.teachers import controls
from tutelage.teachers.online import OnlineTeacher

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch

    from tutelage.config import LiveTeacher, ModelTeacher
    from tutelage.data.store import Store
    from tutelage.teachers.base import Teacher

CONTROLS: dict[str, Callable[[np.ndarray, int], Teacher]] = {
    "unigram": controls.unigram,
    "uniform": controls.uniform,
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
    model = hub.load(path, revision=revision).to(device)
    online = OnlineTeacher(model, hub.forward_flops(model, context_length))
    if online.vocab_size < store.vocab_size:  # above it are padded rows, which the objective leaves out
        raise UserError(
            f"teacher {path}: its vocabulary has {online.vocab_size} entries, the token store's has "
            f"{store.vocab_size}; teacher and student must share a tokenizer"
        )
    check_same_tokenizer(f"teacher {path}", Path(path), store.path)
    return online


def locate(teacher: RunTeacher | ModelTeacher, runs: Path) -> tuple[str, str | None]:
    """(directory or Hub name, revision) of a teacher model."""
    if not isinstance(teacher, RunTeacher):
        return teacher.path, teacher.revision
    path = runs / teacher.run / "model"
    if not path.is_dir():
        raise UserError(f"teacher run {teacher.run}: {path} does not exist; train that run to its end first")
    return str(path), None


def check_same_tokenizer(what: str, model: Path, store: Path) -> None:
    """Equal vocabulary sizes are not enough: the ids must mean the same strings.

    A Hub name, or weights without a tokenizer beside them, cannot be checked and pass.

    Raises:
        UserError: the tokenizers differ; the message begins with `what`.
    """
    if not (model / "tokenizer.json").is_file():
        return
    vocabularies = [Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for path in (model, store)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"{what}: its tokenizer differs from that of {store}; they must share one "
            "(build the store with tokenizer.path)"
        )
