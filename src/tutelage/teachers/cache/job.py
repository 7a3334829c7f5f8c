"""From a config to a cache that is ready to be written, checked before any compute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage import processes
from tutelage.config.load import digest
from tutelage.config.teacher_config import (
    CacheTeacher,
    ControlTeacher,
    MeanTeacher,
    ModelTeacher,
    RunTeacher,
    SingleTeacher,
    single_teachers,
    teacher_id,
)
from tutelage.data.loader import Documents, positions_of
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models import hub
from tutelage.models.devices import Hardware
from tutelage.models.directory import ModelState, identify, is_local
from tutelage.models.forward_memory import ForwardPass, may_not_fit, shape_at, writing_parts
from tutelage.names import find, named_teacher
from tutelage.teachers.cache.codec import CodecSettings
from tutelage.teachers.cache.formats import make_codec
from tutelage.teachers.cache.layout import (
    SCHEMA_VERSION,
    CacheManifest,
    Layout,
    TeacherRecord,
    read_cache_manifest,
    targets_fingerprint,
)
from tutelage.teachers.cache.shard import INDEX_BYTES, packed
from tutelage.teachers.kinds import TEACHERS, TeacherContext, locate
from tutelage.types import PLAIN, Batch, DenseTargets, MeanTargets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from tutelage.config.teacher_config import TeachConfig, TeacherConfig
    from tutelage.data.store import SplitView, Store
    from tutelage.teachers.cache.codec import Codec
    from tutelage.teachers.cache.shard import Packed
    from tutelage.teachers.live import Teacher
    from tutelage.types import WholeTargets

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_NOT_THE_CONTENT = {"name", "store", "teacher", "device", "threads", "runs", "output"}


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The cache that a config stands for.

    Attributes:
        config: what was asked for.
        store: the text.
        teacher: as in the config, with a Hub name pinned to a commit.
        teacher_fingerprint: identity of the teacher's weights.
        states: of the files of local models when they were identified.
        path: the cache's directory.
    """

    config: TeachConfig
    store: Store
    teacher: TeacherConfig
    teacher_fingerprint: str
    states: tuple[ModelState, ...]
    path: Path

    @property
    def fingerprint(self) -> str:
        """What the manifest's `fingerprint` is to be."""
        teacher = self.teacher_fingerprint, _attention(self.teacher)
        context_length = self.config.context_length
        return targets_fingerprint(self.config, self.store.fingerprint, context_length, *teacher)


@dataclass(frozen=True, slots=True)
class CacheJob:
    """A cache, ready to be written.

    Attributes:
        plan: which cache.
        split: the train split, mapped from disk.
        documents: where its documents begin; None if they are not kept apart.
        device: where the teacher computes.
        teacher: whose targets are stored.
        head: the teacher's head without padded rows, by the names in head.safetensors: "head" [V, E] and,
            where it has one, "bias" [V]; empty of a mean of teachers.
        codec: from targets to bytes.
        manifest: of the cache, without the head's checksum.
    """

    plan: CachePlan
    split: SplitView
    documents: Documents | None
    device: torch.device
    teacher: Teacher
    head: Mapping[str, Tensor]
    codec: Codec
    manifest: CacheManifest

    @property
    def bytes_per_token(self) -> float:
        """Size of a position by the codec's own reckoning, with its part of the index."""
        return self.codec.bits_per_token() / 8 + INDEX_BYTES / self.manifest.layout.context_length

    @property
    def head_bytes(self) -> int:
        """Size of head.safetensors without its header; 0 for formats that need none."""
        parts = self.head.values() if self.manifest.format.kind == "hidden" else ()
        return sum(part.nbytes for part in parts)

    def targets(self, batch: Batch) -> WholeTargets:
        """The teacher's distributions over the store's vocabulary."""
        return _targets(self.teacher, batch, self.plan)

    def encoded(self, targets: WholeTargets, batch: Batch) -> tuple[list[Packed], int]:
        """A batch's blocks as they are stored, and its positions."""
        labels_N = batch.labels_BT.flatten()
        blocks = self.codec.encode(targets, labels_N, batch.starts[0], batch.tokens_BT.shape[1])
        return [packed(block, compress=self.manifest.compress) for block in blocks], len(labels_N)

    def batches(self, shard: int) -> Iterator[Batch]:
        """The teacher's batches for one shard: fixed by the config, so that rounding is too."""
        layout = self.manifest.layout
        blocks = layout.blocks_of(shard)
        whole = blocks.stop - (layout.block_tokens(blocks.stop - 1) < layout.context_length)
        size = max(1, self.manifest.batch_tokens // layout.context_length)
        for first in range(blocks.start, whole, size):
            yield self._batch(first, min(size, whole - first), layout.context_length)
        if whole < blocks.stop:
            yield self._batch(whole, 1, layout.block_tokens(whole))

    def _batch(self, first: int, contexts: int, length: int) -> Batch:
        start = first * self.manifest.layout.context_length
        ids = torch.from_numpy(self.split.tokens[start : start + contexts * length + 1].astype("int64"))
        shape = (contexts, length)
        starts = tuple(range(start, start + contexts * length, length))
        positions = None
        if self.documents is not None:
            positions = torch.from_numpy(positions_of(self.documents.begins(starts, length)))
        return Batch(ids[:-1].view(shape), ids[1:].view(shape), starts, positions).to(self.device)


def plan_cache(config: TeachConfig) -> CachePlan:
    """Find the cache of `config`: read the store's manifest and the teacher's checksum, load no model.

    Raises:
        UserError: store or teacher is missing.
    """
    teacher = named_teacher(config.teacher, config.runs)
    config = config.model_copy(update={"store": find("store", config.store, "store"), "teacher": teacher})
    store = open_store(config.store)
    models = [one for one in single_teachers(teacher) if isinstance(one, RunTeacher | ModelTeacher)]
    places = [locate(one, config.runs)[0] for one in models]
    states = tuple(ModelState.of(Path(place)) for place in places if is_local(place))
    if isinstance(teacher, MeanTeacher):
        identified = [_identified(part, config.runs, store) for part in teacher.of]
        teacher = teacher.model_copy(update={"of": tuple(part for part, _ in identified)})
        parts = [[one, _attention(part)] for part, one in identified]
        fingerprint = f"mean of {digest(parts)}"
    else:
        teacher, fingerprint = _identified(teacher, config.runs, store)
    content = config.model_dump(mode="json", exclude=_NOT_THE_CONTENT) | {
        "schema_version": SCHEMA_VERSION,
        "teacher": fingerprint,
        "store": store.fingerprint,
    }
    if (attention := _attention(teacher)) is not None:
        content["attn_implementation"] = attention
    path = config.output / f"{config.name}-{digest(content)}"
    return CachePlan(config, store, teacher, fingerprint, states, path)


def _identified(teacher: SingleTeacher, runs: Path, store: Store) -> tuple[SingleTeacher, str]:
    """The teacher with a Hub name pinned to a commit, and the identity of what it teaches."""
    if isinstance(teacher, ControlTeacher):
        return teacher, f"{teacher.kind} of {store.fingerprint}"
    if isinstance(teacher, CacheTeacher):
        return teacher, read_cache_manifest(teacher.path).fingerprint
    fingerprint, commit = identify(*locate(teacher, runs))
    if isinstance(teacher, ModelTeacher):
        teacher = teacher.model_copy(update={"revision": commit})
    return teacher, fingerprint


def memory_warning(plan: CachePlan) -> str | None:
    """What to tell the user before the teacher is loaded if it may not fit into what is free; else None."""
    config = plan.config
    models = [one for one in single_teachers(plan.teacher) if isinstance(one, RunTeacher | ModelTeacher)]
    found = [shape_at(*locate(one, config.runs)) for one in models]
    shapes = [shape for shape in found if shape is not None]
    if not models or len(shapes) < len(models):  # a control, or a family without a formula
        return None
    kind = hub.pick_device(config.device).type
    run = ForwardPass(
        shapes=shapes,
        vocab_size=plan.store.vocab_size,
        tokens=max(config.batch_tokens, config.context_length),
        bytes=_WEIGHT_BYTES[config.dtype],
        eager=config.context_length if any(_attention(one) == "eager" for one in models) else 0,
        cuda=kind == "cuda",
    )
    here = processes.place().local_size
    told = may_not_fit(
        plan.path.name, writing_parts(run), "writing of the cache", Hardware.here(kind, 1, here)
    )
    turns = ["a smaller batch_tokens"] * (config.batch_tokens > config.context_length)
    turns += ["dtype=bfloat16"] * (config.dtype != "bfloat16")
    return f"{told}\nturn: {', '.join(turns)}" if told and turns else told


def load_job(plan: CachePlan) -> CacheJob:
    """Load the teacher of a planned cache and check that it fits the store.

    Raises:
        UserError: naming what does not fit.
    """
    config, store = plan.config, plan.store
    positions = store.manifest.splits["train"].tokens - 1
    if positions < 1:
        raise UserError(f"{store.path}: the train split is empty, so there is nothing to teach")
    device = hub.pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    context = TeacherContext(
        store,
        config.runs,
        config.context_length,
        device,
        document_mask=bool(config.document_mask),
        dtype=config.dtype,
    )
    teacher = TEACHERS[plan.teacher.kind].make(plan.teacher, context)
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for state in plan.states:
        state.refuse_change()
    probe = _targets(teacher, Batch(token_11, token_11, (0,)), plan)
    alone = probe if isinstance(probe, DenseTargets) else None
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        teacher=_record(plan, teacher),
        vocab_size=store.vocab_size,
        width=alone.hidden_NE.shape[1] if alone else 0,
        transform=alone.transform or PLAIN if alone else PLAIN,
        store=store.fingerprint,
        split="train",
        layout=Layout(
            positions=positions,
            context_length=config.context_length,
            contexts_per_shard=max(1, config.shard_tokens // config.context_length),
        ),
        document_mask=bool(config.document_mask),
        dtype=config.dtype,
        batch_tokens=config.batch_tokens,
        format=config.format,
        temperature=config.temperature,
        seed=config.seed,
        compress=config.compress,
        head_sha256=None,
    )
    codec = make_codec(config.format, CodecSettings.of(manifest))
    head = {} if alone is None else {"head": alone.head_VE}
    if alone is not None and alone.bias_V is not None:
        head["bias"] = alone.bias_V
    split = store.split("train")
    documents = Documents(split) if config.document_mask else None
    return CacheJob(plan, split, documents, device, teacher, head, codec, manifest)


def _record(plan: CachePlan, teacher: Teacher) -> TeacherRecord:
    """What the manifest says of the teacher."""
    given = plan.config.teacher
    of = given.of if isinstance(given, MeanTeacher) else ()
    return TeacherRecord(
        kind=given.kind,
        id=teacher_id(given),
        fingerprint=plan.teacher_fingerprint,
        forward_flops=teacher.forward_flops,
        notes=teacher.notes,
        attn_implementation=_attention(plan.teacher),
        parts=tuple((one.kind, teacher_id(one)) for one in of),
    )


def _targets(teacher: Teacher, batch: Batch, plan: CachePlan) -> WholeTargets:
    """Targets without the padded rows of the teacher's head."""
    targets = teacher.targets(batch)
    assert isinstance(targets, DenseTargets | MeanTargets)  # noqa: S101 - what every live teacher gives
    return targets.without_padding(plan.store.vocab_size)


def _attention(teacher: TeacherConfig) -> str | None:
    """How one teacher computes attention, where that was chosen; a mean is asked part by part."""
    return teacher.attn_implementation if isinstance(teacher, RunTeacher | ModelTeacher) else None
