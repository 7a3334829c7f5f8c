"""The registry of teacher kinds, with the function that builds each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from tutelage.config.teacher_config import HiddenFormat, RunTeacher
from tutelage.data.store import learned_counts
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.models import hub, slices
from tutelage.models.flops import model_forward_flops
from tutelage.models.packed import check_documents, check_length
from tutelage.models.sharding import Sharding
from tutelage.teachers.cache.reader import CachedTeacher, check_serves, open_cache
from tutelage.teachers.live import AveragedTeacher, FixedTeacher, OnlineTeacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from tutelage.config.objective_config import ObjectiveConfig
    from tutelage.config.teacher_config import CacheTeacher, ControlTeacher, MeanTeacher, ModelTeacher
    from tutelage.data.store import Store
    from tutelage.teachers.live import Teacher


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TeacherContext:
    """What a teacher is built for.

    Attributes:
        store: the text it reads.
        runs: directory that holds the run of a teacher of kind run; caches lie in `caches` beside it.
        context_length: tokens per sequence.
        device: where targets are wanted.
        mesh: the processes that share the teacher; None for one.
        document_mask: whether the documents of a sequence are kept apart.
        dtype: what a teacher of dtype auto computes in.
        objective: of the student that learns from it; None where a cache is written for any student.
    """

    store: Store
    runs: Path
    context_length: int
    device: torch.device
    mesh: DeviceMesh | None = None
    document_mask: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    objective: ObjectiveConfig | None = None


@dataclass(frozen=True, slots=True)
class TeacherKind:
    """A kind of teacher.

    Attributes:
        summary: what it is.
        make: builds it from its config section.
    """

    summary: str
    make: Callable[[Any, TeacherContext], Teacher]


def _model(config: RunTeacher | ModelTeacher, context: TeacherContext) -> OnlineTeacher:
    """Load a model and check that it reads the store's token ids."""
    path, revision = locate(config, context.runs)
    what = f"teacher {path}"
    tokenizer = check_model_tokenizer(
        what,
        path,
        context.store,
        revision=revision,
        assume=config.assume_same_tokenizer,
        setting="teacher.assume_same_tokenizer",
    )
    dtype = _DTYPES[context.dtype if config.dtype == "auto" else config.dtype]
    described = path, revision, dtype, config.attn_implementation
    pending = None if context.mesh is None else slices.describe(*described)
    model = hub.load(*described) if pending is None else pending.model
    beyond = check_length(model, what, context.context_length)
    notes = tokenizer.notes if beyond is None else (*tokenizer.notes, beyond)
    tokenizer.check_rows(what, model.get_output_embeddings().weight.shape[0], context.store)
    flops = model_forward_flops(model, context.context_length)
    if context.mesh is None or config.placement == "replicate":
        teacher = OnlineTeacher(model, flops, notes)
    else:
        sharding = Sharding(context.mesh, None, config.reshard_after_forward)
        teacher = OnlineTeacher(model, flops, notes, sharding)
    if pending is None:
        model.to(context.device)
    else:
        pending.load(context.device)
        teacher.use(lambda loaded: hub.check_logits(loaded, path))
    if context.document_mask:
        length = context.context_length
        teacher.use(lambda loaded: check_documents(hub.body_and_head(loaded)[0], what, length))
    return teacher


def _unigram(_config: ControlTeacher, context: TeacherContext) -> FixedTeacher:
    """One is added to every count, so that no probability is zero."""
    counts_V = learned_counts(context.store.split("train"), context.store.vocab_size) + 1.0
    return FixedTeacher(torch.from_numpy(counts_V / counts_V.sum()))


def _uniform(_config: ControlTeacher, context: TeacherContext) -> FixedTeacher:
    vocab_size = context.store.vocab_size
    return FixedTeacher(torch.full((vocab_size,), 1.0 / vocab_size))


def _cache(config: CacheTeacher, context: TeacherContext) -> CachedTeacher:
    """Open a cache and check that it holds this text and what the objective needs."""
    cache = open_cache(config.path)
    cache.check_fits(context.store, context.context_length, document_mask=context.document_mask)
    if context.objective is not None:
        check_serves(config.path, context.objective)
    return CachedTeacher(cache, context.device)


def _mean(config: MeanTeacher, context: TeacherContext) -> AveragedTeacher:
    """Build each teacher; a cache among them has to hold whole distributions."""
    context = replace(context, objective=None)  # what it asks for is asked of the mean
    parts = []
    for place, part in enumerate(config.of):
        teacher = TEACHERS[part.kind].make(part, context)
        if teacher.retained is not None and not isinstance(teacher.retained, HiddenFormat):
            raise UserError(
                f"teacher.of[{place}]: holds {teacher.retained.kind} targets, parts of distributions; a mean "
                "is of whole ones: give the teacher itself, or a cache of format hidden"
            )
        parts.append(teacher)
    return AveragedTeacher(parts)


TEACHERS: dict[str, TeacherKind] = {
    "run": TeacherKind("a finished run in the same output directory", _model),
    "model": TeacherKind("any causal language model in Hugging Face format with the same vocabulary", _model),
    "unigram": TeacherKind("control: the token frequencies of the training text, without prompts", _unigram),
    "uniform": TeacherKind("control: 1/V for every token; the objective becomes label smoothing", _uniform),
    "cache": TeacherKind("targets computed before, by `tutelage teach`", _cache),
    "mean": TeacherKind("the mean of several teachers' probabilities; each runs on every batch", _mean),
}
"""Kinds by the name users write."""


def locate(teacher: RunTeacher | ModelTeacher, runs: Path) -> tuple[str, str | None]:
    """(directory or Hub name, revision) of a teacher model.

    Raises:
        UserError: it is a run that has no trained model.
    """
    if not isinstance(teacher, RunTeacher):
        return teacher.path, teacher.revision
    path = runs / teacher.run / "model"
    if not path.is_dir():
        copied = f", or if only results of it are here, delete {path.parent} and train that run again"
        raise UserError(
            f"teacher run {teacher.run}: {path} does not exist; train that run to its end first"
            + (copied if path.parent.is_dir() and not any(path.parent.glob("checkpoints/*")) else "")
        )
    return str(path), None
