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

    from tutelage.config import ModelTeacher, RunConfig
    from tutelage.data.store import Store
    from tutelage.teachers.base import Teacher

CONTROLS: dict[str, Callable[[np.ndarray, int], Teacher]] = {
    "unigram": controls.unigram,
    "uniform": controls.uniform,
}


def make_teacher(config: RunConfig, store: Store, device: torch.device) -> Teacher | None:
    """Build the teacher of `config`, or None.

    Raises:
        UserError: it does not exist, is unfinished, or has another tokenizer or vocabulary.
    """
    if config.teacher is None:
        return None
    if isinstance(config.teacher, ControlTeacher):
        return CONTROLS[config.teacher.kind](store.split("train").tokens, store.vocab_size)
    path, revision = _locate(config.teacher, config.output)
    model = hub.load(path, revision=revision).to(device)
    teacher = OnlineTeacher(model, hub.forward_flops(model, config.data.sequence_length))
    if teacher.vocab_size < store.vocab_size:  # above it are padded rows, which the objective leaves out
        raise UserError(
            f"teacher {path}: its vocabulary has {teacher.vocab_size} entries, the token store's has "
            f"{store.vocab_size}; teacher and student must share a tokenizer"
        )
    check_same_tokenizer(f"teacher {path}", Path(path), store.path)
    return teacher


def _locate(teacher: RunTeacher | ModelTeacher, output: Path) -> tuple[str, str | None]:
    if not isinstance(teacher, RunTeacher):
        return teacher.path, teacher.revision
    path = output / teacher.run / "model"
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
