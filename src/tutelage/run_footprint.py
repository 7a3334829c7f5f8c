"""Read off the config of a run what its memory depends on: shapes, batches, devices, kept targets."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tutelage.config.base import parse_tokens, whole_batches
from tutelage.config.teacher_config import (
    CacheTeacher,
    ControlTeacher,
    Format,
    HiddenFormat,
    MeanTeacher,
    MinVarianceFormat,
    ModelTeacher,
    MultinomialFormat,
    RunTeacher,
    TopKFormat,
    single_teachers,
)
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models.directory import hub_config, is_local, read_config
from tutelage.models.flops import parameters
from tutelage.models.forward_memory import shape_at
from tutelage.models.memory import Footprint
from tutelage.models.shapes import find_shape
from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.run_config import RunConfig
    from tutelage.config.teacher_config import TeacherConfig
    from tutelage.models.devices import Hardware
    from tutelage.models.shapes import ModelShape
    from tutelage.teachers.cache.layout import CacheManifest

_STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Of a value in hidden states that are kept."""
_MASKED = (None, "sdpa", "eager")
"""Kinds of attention that are given a mask to keep documents apart."""


def footprint(
    config: RunConfig,
    shape: ModelShape,
    teachers: Sequence[ModelShape],
    vocab_size: int,
    hardware: Hardware,
    cached: Sequence[ModelShape] = (),
) -> Footprint:
    """What the memory of a run depends on.

    Args:
        config: the run.
        shape: of its student.
        teachers: shapes of those that run beside it.
        vocab_size: of the token store.
        hardware: where it is to run.
        cached: shapes of the teachers whose targets it keeps before it begins.

    Raises:
        UserError: the processes do not fit the mesh that the run asks for.
    """
    try:
        replicas, shards = config.parallel.mesh(hardware.devices)
    except ValueError as error:
        raise UserError(f"run {config.name}: parallel: {error}") from None
    length = config.data.sequence_length
    share = max(length, config.global_batch_tokens // hardware.devices)
    micro = min(config.micro_batch_tokens or share, share)
    masked = config.data.document_mask and config.model.attn_implementation in _MASKED
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and hardware.cuda)
    taught = _taught(config, teachers, cached, hardware, shards, half=half)
    return Footprint(
        shape=shape,
        vocab_size=vocab_size,
        micro_batch=micro,
        micro_batches=max(1, share // micro),
        chunk=config.objective.tokens_per_chunk(vocab_size, hardware.kind, dense=taught["dense"]),
        half=half,
        replicate=replicas,
        shards=shards,
        reshard=config.parallel.reshard_after_forward,
        recomputation=config.runtime.activation_checkpointing,
        compiled=config.runtime.compiles(hardware.kind),
        mask_length=length if masked else 0,
        eager=length if config.model.attn_implementation == "eager" else 0,
        cuda=hardware.cuda,
        copied=not hardware.cuda and _is_copied(config, parameters(shape, vocab_size).total),
        **taught,
    )


def _taught(
    config: RunConfig,
    teachers: Sequence[ModelShape],
    cached: Sequence[ModelShape],
    hardware: Hardware,
    shards: int,
    *,
    half: bool,
) -> dict[str, Any]:
    """The fields of a footprint that a teacher decides."""
    singles = single_teachers(config.teacher)
    models = [one for one in singles if isinstance(one, RunTeacher | ModelTeacher)]
    controls = [one for one in singles if isinstance(one, ControlTeacher)]
    is_live = _kept_format(config.teacher) is None
    kept = _kept_targets(config.teacher, cached)
    width = sum(one.width for one in kept)
    dense = bool(teachers) or width > 0 or (is_live and bool(controls))
    is_eager = any(one.attn_implementation == "eager" for one in models)
    taught_half = all(half if one.dtype == "auto" else one.dtype == "bfloat16" for one in models)
    return {
        "teachers": tuple(teachers),
        "teacher_bytes": 2 if taught_half else 4,
        "teacher_shards": shards if models and all(one.placement == "shard" for one in models) else 1,
        "teacher_reshards": all(one.reshard_after_forward for one in models),
        "teacher_eager": config.data.sequence_length if is_eager else 0,
        "dense": dense,
        "mean": isinstance(config.teacher, MeanTeacher) and is_live,
        "temporaries": config.objective.temporaries(dense=dense),
        "cached": tuple(cached),
        "target_bytes": sum(one.used for one in kept),
        "read_bytes": 0.0 if hardware.cuda else sum(one.read for one in kept),
        "target_width": width,
    }


def student_shape(config: RunConfig) -> ModelShape:
    """Shape of a run's student.

    Raises:
        UserError: it is a model of a family that the plan does not know, or not here.
    """
    if config.model.shape is not None:
        return find_shape(config.model.shape)
    if config.model.path is not None:
        return _shape_at(config.model.path, config.model.revision, "model.path")
    return _shape_of_run(config, str(config.model.run), "model.run")


def teacher_shapes(config: RunConfig) -> tuple[list[ModelShape], list[ModelShape]]:
    """Shapes of the teachers that run beside the student, and of those whose targets are kept before.

    Where the plan does not know the family of the latter, the writing of the cache is left out; but hidden
    states come with a head, which stands beside the student.

    Raises:
        UserError: as `student_shape`.
    """
    kept = _kept_format(config.teacher)
    if kept is None:
        return _shapes_of_teachers(config), []
    try:
        return [], _shapes_of_teachers(config)
    except UserError:
        if isinstance(kept, HiddenFormat):
            raise
        return [], []


def _kept_format(teacher: TeacherConfig | None) -> Format | None:
    """Format in which a run keeps its teacher's targets; None if it does not."""
    if isinstance(teacher, RunTeacher | ModelTeacher | MeanTeacher) and teacher.cache is not None:
        return teacher.cache.format
    return None


def _shapes_of_teachers(config: RunConfig) -> list[ModelShape]:
    found = []
    for teacher in single_teachers(config.teacher):
        if isinstance(teacher, RunTeacher):
            found.append(_shape_of_run(config, teacher.run, "teacher.run"))
        elif isinstance(teacher, ModelTeacher):
            found.append(_shape_at(teacher.path, teacher.revision, "teacher.path"))
    return found


def _shape_of_run(config: RunConfig, run: str, field: str) -> ModelShape:
    """Shape of another run in the same output directory, which may still be in training.

    Most have it by name in their config; only models are looked at with torch.
    """
    directory = RunDirectory(config.output / run)
    with contextlib.suppress(UserError):
        if (name := directory.config().model.shape) is not None:
            return find_shape(name)
    if directory.model.is_dir():
        return _shape_at(str(directory.model), None, field)
    return student_shape(directory.config())


def _shape_at(path: str, revision: str | None, field: str) -> ModelShape:
    shape = shape_at(path, revision)
    if shape is None:
        settings = read_config(Path(path)) if is_local(path) else hub_config(path, revision)
        raise UserError(
            f"{field} = {path}: the plan knows the sizes of attention with rotary positions and a gated MLP "
            f"(Llama, Qwen, Mistral, ...), not of model_type {settings.get('model_type')}; such a run can be "
            "started without a plan"
        )
    return shape


def vocabulary(config: RunConfig, shape: ModelShape) -> int:
    """Entries of the token store's vocabulary; of the paper's where there is no store yet."""
    if shape.vocab_size is not None and not (config.data.store / "manifest.json").is_file():
        return shape.vocab_size
    return open_store(config.data.store).vocab_size


class _KeptTargets(NamedTuple):
    """What a token's targets take that come from a cache.

    Attributes:
        read: bytes of them as they are kept, in memory of the CPU until they are used.
        used: bytes of them when they are used, in memory of the device.
        width: of its hidden states, whose head is there too; 0 if it has none.
    """

    read: float
    used: float
    width: int


def _kept_targets(teacher: TeacherConfig | None, cached: Sequence[ModelShape]) -> list[_KeptTargets]:
    """The targets that are read from disk, of each cache among the teachers.

    Args:
        teacher: of the run.
        cached: shapes of the teachers whose targets the run itself keeps.
    """
    if (own := _kept_format(teacher)) is not None:
        return [_kept(own, cached[0].hidden if cached else 0)]
    manifests = [_manifest(one) for one in single_teachers(teacher) if isinstance(one, CacheTeacher)]
    return [_kept(manifest.format, manifest.width) for manifest in manifests]


def _manifest(teacher: CacheTeacher) -> CacheManifest:
    from tutelage.teachers.cache.layout import read_cache_manifest  # noqa: PLC0415 - loads torch

    return read_cache_manifest(teacher.path)


def _kept(kept: Format, width: int) -> _KeptTargets:
    """What the targets of a format take: of kept ids an int64 and a float32 each, and two numbers more."""
    match kept:
        case HiddenFormat(dtype=dtype):
            return _KeptTargets(_STATE_BYTES[dtype] * width, 4.0 * width, width)
        case TopKFormat(k=ids) | MinVarianceFormat(ids=ids) | MultinomialFormat(draws=ids):
            return _KeptTargets(12.0 * ids + 8, 12.0 * ids + 8, 0)


def _is_copied(config: RunConfig, weights: int) -> bool:
    """Whether a run copies its state for checkpoints, as it does for those before its last step."""
    batch, kept = config.global_batch_tokens, config.checkpoint
    every = min(whole_batches(each, batch) for each in (kept.every, kept.keep_every) if each is not None)
    on_the_way = kept.keep_before_decay or every < parse_tokens(config.tokens, weights) // batch
    return kept.asynchronous and on_the_way
