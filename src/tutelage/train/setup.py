"""Open a run's student and teacher, and check that they fit before any compute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.config.objective_config import TopK
from tutelage.config.teacher_config import CacheTeacher, ModelTeacher, single_teachers
from tutelage.data.loader import run_loader
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.models import hub, shapes, slices
from tutelage.models.directory import ModelState
from tutelage.models.export import Base
from tutelage.models.initial_weights import fill_model
from tutelage.models.packed import check_documents, check_length, freeze_beside
from tutelage.objective import make_gate, make_policy
from tutelage.run_directory import RunDirectory
from tutelage.teachers import TeacherContext, make_teacher
from tutelage.teachers.cache.reader import check_serves
from tutelage.train.layers import compile_layers, recompute
from tutelage.train.objective_model import ObjectiveModel
from tutelage.train.optim import adamw, learning_rate
from tutelage.train.parallel import place, use_model
from tutelage.train.student import Student

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import Store
    from tutelage.progress import Progress
    from tutelage.teachers.live import Teacher
    from tutelage.train.distributed import World

_FALLBACK_LR = 3e-4
"""Peak learning rate of a model that is no shape of the ladder and whose config names none."""


class GivenModels:
    """The models that configs name by path, start or teacher, as their files were at one moment."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        paths = {config.model.path for config in configs}
        for config in configs:
            paths |= {one.path for one in single_teachers(config.teacher) if isinstance(one, ModelTeacher)}
        there = [Path(path) for path in paths if path is not None]
        self._states = [ModelState.of(path) for path in there if path.exists()]

    def refuse_change(self) -> None:
        """Refuse models that were written since. Raises `UserError`."""
        for state in self._states:
            state.refuse_change()


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
            ("parallel", first.parallel, other.parallel),
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


def open_student(config: RunConfig, directory: RunDirectory, world: World) -> Student:
    """Open the store, build or load the model, and check that everything fits together.

    Nothing is trained and nothing written. The teacher is opened apart: several students may share it.

    Args:
        config: the run.
        directory: where it will write.
        world: this process among all, and its device.

    Raises:
        UserError: naming what does not fit.
    """
    store = open_store(config.data.store)
    _check_stage(config, store)
    _check_truncation(config, store)
    _check_attention(config, world.device.type)
    start = _starting_model(config, store, world)
    recompute(start.model, config.runtime)
    notes = compile_layers(start.model, config.runtime, world.device)
    steps = _steps(config, sum(p.numel() for p in start.model.parameters()))
    half = _half_dtype(config, world.device)
    # Processes that share the weights gather them in the compute dtype, so nothing is left to cast.
    autocast = half if world.mesh is None else None
    module = ObjectiveModel(start.model, config.objective, store.vocab_size, autocast)
    place(module, world, config.parallel, half, start.fill)
    if start.check is not None:
        use_model(module, start.check)
    return Student(
        config=config,
        directory=directory,
        world=world,
        module=module,
        optimizer=adamw(start.model, config.optim, start.lr),
        autocast=half,
        policy=make_policy(
            config.objective.alpha,
            partial(learning_rate, config.optim, 1.0, batch_tokens=config.global_batch_tokens),
        ),
        gate=make_gate(config.objective.gate),
        loader=run_loader(config, store, steps, world.rank, world.size),
        steps=steps,
        lr=start.lr,
        base=start.base,
        notes=(*start.notes, *notes),
    )


def open_teacher(config: RunConfig, world: World, progress: Progress | None = None) -> Teacher:
    """Open the teacher of a run that has one; if its targets are to be cached, write what is missing first.

    Raises:
        UserError: as `make_teacher`.
        Stopped: on a signal to stop while a cache is written; finished shards stay.
    """
    assert config.teacher is not None  # noqa: S101 - asked for only if there is one
    context = TeacherContext(
        open_store(config.data.store),
        config.output,
        config.data.sequence_length,
        world.device,
        world.mesh,
        bool(config.data.document_mask),
        "float32" if _half_dtype(config, world.device) is None else "bfloat16",
        objective=config.objective,
    )
    teacher = make_teacher(config.teacher, context, progress)
    teacher.use(lambda model: compile_layers(model, config.runtime, world.device))
    return teacher


def _check_stage(config: RunConfig, store: Store) -> None:
    """Refuse to pretrain on prompts, and to fine-tune without any."""
    if config.stage == "sft" and not store.manifest.masked:
        raise UserError(
            f"stage = sft: in {store.path} every token counts, there are no prompts; build the store from "
            "sources of kind pairs, hub_pairs or corpus_pairs"
        )
    if config.stage == "pretrain" and store.manifest.masked:
        raise UserError(
            f"stage = pretrain: {store.path} holds prompts, which carry no loss; set stage: sft and "
            "model.run or model.path, or use a store of plain text"
        )


def _check_truncation(config: RunConfig, store: Store) -> None:
    """Refuse to keep more of the teacher's tokens than there are."""
    truncation = config.objective.truncation
    if isinstance(truncation, TopK) and truncation.k > store.vocab_size:
        raise UserError(
            f"objective.truncation.k = {truncation.k:,}: {store.path} has a vocabulary of "
            f"{store.vocab_size:,}; keep fewer, or drop objective.truncation"
        )


def _check_attention(config: RunConfig, kind: str) -> None:
    """Refuse attention without a backward pass on a type of device; torch would say so in the first step."""
    if config.model.attn_implementation == "flex_attention" and kind in {"cpu", "mps"}:
        raise UserError(
            f"model.attn_implementation = flex_attention: it has no backward pass on {kind}, so no model can "
            "be trained with it there; use sdpa or eager, or a GPU"
        )


@dataclass(frozen=True, slots=True)
class _StartingModel:
    """A student's model before training, its peak learning rate, and `base` and `notes` as in `Student`.

    Attributes:
        fill: gives a model on the meta device weights on another, once it is sharded; None: it has them.
        check: refuses a model that cannot be trained as it is to be; needs its weights.
    """

    model: PreTrainedModel
    lr: float
    base: Base | None
    notes: tuple[str, ...]
    fill: Callable[[torch.device], object] | None = None
    check: Callable[[PreTrainedModel], None] | None = None


def _starting_model(config: RunConfig, store: Store, world: World) -> _StartingModel:
    length, attention = config.data.sequence_length, config.model.attn_implementation
    if config.model.shape is not None:
        shape = shapes.find_shape(config.model.shape)
        drawn = shape, store.vocab_size, length, config.seed
        model = hub.build(*drawn, "cpu" if world.mesh is None else "meta", attention)
        fill = None if world.mesh is None else partial(fill_model, model, *drawn)
        return _StartingModel(model, config.optim.lr or shape.lr, None, (), fill)
    path = _start(config)
    what = f"model {path}"
    tokenizer = check_model_tokenizer(
        what,
        path,
        store,
        revision=config.model.revision,
        assume=config.model.assume_same_tokenizer,
        setting="model.assume_same_tokenizer",
    )
    described = path, config.model.revision, torch.float32, attention
    pending = None if world.mesh is None else slices.describe(*described)
    model = hub.load(*described) if pending is None else pending.model
    model.get_input_embeddings().padding_idx = None  # nothing is padded here, so no token may stand still
    freeze_beside(model)
    beyond = check_length(model, what, length)
    tokenizer.check_rows(what, model.get_output_embeddings().weight.shape[0], store)
    notes = [*tokenizer.notes, *([] if beyond is None else [beyond])]
    if tokenizer.ids > store.vocab_size:
        notes.append(
            f"{what}: its tokenizer has {tokenizer.ids:,} ids, {store.path} {store.vocab_size:,}: the others "
            "get no probability in training and in the scores of this run, and no gradient but weight decay"
        )
    base = Base(tokenizer.directory, tokenizer=tokenizer.is_the_stores)

    def check(loaded: PreTrainedModel) -> None:
        if pending is not None:  # else that was done when it was loaded
            hub.check_logits(loaded, path)
        if config.data.document_mask:
            check_documents(hub.body_and_head(loaded)[0], what, length)

    loads = None if pending is None else pending.load
    return _StartingModel(model, config.optim.lr or _FALLBACK_LR, base, tuple(notes), loads, check)


def _start(config: RunConfig) -> str:
    """Return where the weights lie that the run starts from."""
    if config.model.path is not None:
        return config.model.path
    run = RunDirectory(config.output / str(config.model.run))
    if not run.model.is_dir():
        raise UserError(f"model.run {config.model.run}: {run.model} does not exist; {run.to_have_model()}")
    return str(run.model)


def _steps(config: RunConfig, parameters: int) -> int:
    try:
        return config.steps(parameters)
    except ValueError as error:
        raise UserError(f"run {config.name}: {error}") from None


def _half_dtype(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """Return the compute dtype when it is not float32."""
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None
