"""Check given teachers, and find out what they cost: no weight is read, nothing is computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.config.teacher_config import ModelTeacher, single_teachers, teacher_id
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.models.directory import hub_config, is_local, read_config
from tutelage.models.flops import forward_flops, model_forward_flops, shape_of
from tutelage.models.shapes import find_shape, read_shape
from tutelage.names import local_model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.config.study_config import TeacherSpec
    from tutelage.models.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class GivenModel:
    """A model that no run of a study trains.

    Attributes:
        forward_flops: of its forward pass per token, as the runs that it teaches count them.
        width: of its hidden states.
        shape: None if the plan of memory does not know its family.
    """

    forward_flops: float
    width: int
    shape: ModelShape | None


@functools.cache  # every student of a study asks
def given_model(name: str, context: int) -> GivenModel | None:
    """Describe a model directory, or a model on the Hub; None if it cannot be read here.

    Args:
        name: as in a study.
        context: tokens per sequence.
    """
    try:
        settings, model = _outline(local_model(name, "model"))
    except UserError:
        return None
    shape = shape_of(read_shape(settings, name), model)
    width = int(model.get_output_embeddings().weight.shape[1])
    return GivenModel(model_forward_flops(model, context), width, shape)


def _outline(path: str, revision: str | None = None) -> tuple[dict[str, Any], PreTrainedModel]:
    """The config.json of a model, and the model that it describes, without weights."""
    from tutelage.models import hub  # noqa: PLC0415 - loads torch, which other studies do not need

    settings = read_config(Path(path)) if is_local(path) else hub_config(path, revision)
    return settings, hub.outline(path, settings)


def check_given_models(configs: Iterable[RunConfig]) -> list[str]:
    """Check that given teachers are models that read the tokens of the runs that they are to teach.

    Each run checks its own; this is for all of them, before the first is trained.

    Returns:
        What the user should know of them.

    Raises:
        UserError: one has another tokenizer, or none, or its config.json describes no model that can teach.
    """
    notes: dict[tuple[str, Path], tuple[str, ...]] = {}
    for config in configs:
        for teacher in single_teachers(config.teacher):
            key = teacher_id(teacher), config.data.store
            if not isinstance(teacher, ModelTeacher) or key in notes:
                continue
            what, store = f"teacher {teacher.path}", open_store(config.data.store)
            found = check_model_tokenizer(what, teacher.path, store, revision=teacher.revision, setting=None)
            _, model = _outline(teacher.path, teacher.revision)
            found.check_rows(what, model.get_output_embeddings().weight.shape[0], store)
            notes[key] = found.notes
    return [note for found in notes.values() for note in found]


def teacher_forward_flops(spec: TeacherSpec, vocab_size: int, context: int) -> float:
    """Operations of a teacher's forward pass per token; 0 for a control, and if it cannot be read here.

    Args:
        spec: the teacher.
        vocab_size: entries of the study's vocabulary.
        context: tokens per sequence.
    """
    if spec.shape is not None:
        return forward_flops(find_shape(spec.shape), vocab_size, context)
    found = None if spec.model is None else given_model(spec.model, context)
    return 0.0 if found is None else found.forward_flops


def teacher_shape(spec: TeacherSpec, context: int) -> tuple[ModelShape | None, list[str]]:
    """Shape of the teacher that runs beside a student, to plan its memory with, and what is left out of that.

    Args:
        spec: the teacher.
        context: tokens per sequence.
    """
    if spec.model is None:
        return None if spec.shape is None else find_shape(spec.shape), []
    found = given_model(spec.model, context)
    if found is None:
        return None, [f"{spec.model} cannot be read here; its forward passes and memory are left out"]
    unknown = f"the memory of {spec.model} is left out; how its family computes is not known"
    return found.shape, [] if found.shape is not None else [unknown]
