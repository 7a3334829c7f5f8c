"""From a config to everything a run needs, checked before any compute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from tutelage.config.objective_config import TopKTruncation
from tutelage.config.teacher_config import kd_name
from tutelage.data.loader import Loader
from tutelage.data.store import open_store
from tutelage.data.tokenizer_comparison import check_model_tokenizer
from tutelage.errors import UserError
from tutelage.models import hub, shapes
from tutelage.models.export import Base
from tutelage.models.positions import check_length
from tutelage.objective import Objective, TopK, TopP, make_gate, make_policy
from tutelage.teachers import TeacherContext, make_teacher
from tutelage.train import distributed
from tutelage.train.step import Trainee, adamw, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tutelage.config.objective_config import ObjectiveConfig
    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import Store
    from tutelage.objective import Policy
    from tutelage.teachers.live import Teacher
    from tutelage.train.checkpoint import Counters
    from tutelage.types import LogitTransform

_FALLBACK_LR = 3e-4
"""Peak learning rate of a model that is on no rung and whose config names none."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A run, ready to train.

    Attributes:
        config: what was asked for.
        device: where it trains.
        world: this process among all.
        model: the student.
        trainee: the student split for the step, with optimizer, objective, teacher and gate.
        policy: gives alpha of every step.
        loader: batches as a function of the step.
        steps: optimizer steps in the budget.
        lr: peak learning rate.
        micro_sequences: sequences per forward pass on this rank.
        checkpoint_tokens: tokens between checkpoints.
        parameters: total parameters of the student.
        student_flops: forward + backward FLOPs per token of the student.
        base: the model that the student goes on from, if its directory is on this machine.
        notes: what the user should know about student and teacher.
    """

    config: RunConfig
    device: torch.device
    world: distributed.World
    model: PreTrainedModel
    trainee: Trainee
    policy: Policy
    loader: Loader
    steps: int
    lr: float
    micro_sequences: int
    checkpoint_tokens: int
    parameters: int
    student_flops: float
    base: Base | None
    notes: tuple[str, ...]

    @property
    def epochs(self) -> float:
        """Passes over the training split; above 1 the data repeats."""
        return self.steps / self.loader.steps_per_epoch

    @property
    def kd_name(self) -> str:
        """Name of the divergence among the metrics."""
        teacher = self.trainee.teacher
        return kd_name(self.config.objective, None if teacher is None else teacher.retained)

    def memory(self) -> dict[str, dict[str, float]]:
        """What the alpha policy and the gate remember, as fields of `Counters`. Waits for the device."""
        gate = self.trainee.gate
        return {"policy": self.policy.state(), "gate": {} if gate is None else gate.state()}

    def load_memory(self, counters: Counters) -> None:
        """Give policy and gate back what a checkpoint kept; at the start of a run there is nothing."""
        if counters.policy:
            self.policy.load(counters.policy)
        if counters.gate and self.trainee.gate is not None:
            self.trainee.gate.load(counters.gate)

    def ledger(self, counters: Counters) -> dict[str, float]:
        """What state.json says of progress and cost."""
        tokens = counters.step * self.config.global_batch_tokens
        teacher = self.trainee.teacher
        return {
            "step": counters.step,
            "steps": self.steps,
            "tokens": tokens,
            "seconds": round(counters.seconds, 3),
            "tokens_per_second": round(tokens / max(counters.seconds, 1e-9), 1),
            "parameters": self.parameters,
            "train_flops": self.student_flops * tokens,
            "teacher_flops": teacher.forward_flops * counters.teacher_tokens if teacher else 0.0,
        }


@dataclass(frozen=True, slots=True)
class _Student:
    """A student's model, its peak learning rate, and `base` and `notes` as in `Setup`."""

    model: PreTrainedModel
    lr: float
    base: Base | None
    notes: tuple[str, ...]


def prepare(config: RunConfig, teacher: Teacher | None = None) -> Setup:
    """Open the store, build or load the models, and check that everything fits together.

    Args:
        config: the run.
        teacher: that of `config`, if it is there already because another run has the same.

    Raises:
        UserError: naming what does not fit.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    device = hub.pick_device(config.runtime.device)
    world = distributed.start(device)
    store = open_store(config.data.store)
    _check_stage(config, store)
    student = _student(config, store)
    model, lr = student.model.to(device), student.lr
    body, head = hub.body_and_head(model)
    parameters = sum(p.numel() for p in model.parameters())
    steps = _steps(config, parameters)
    if config.teacher is None:
        teacher = None
    elif teacher is None:
        teacher = _teacher(config, store, device)
    sequences = config.global_batch_tokens // config.data.sequence_length
    micro = (config.micro_batch_tokens or config.global_batch_tokens) // config.data.sequence_length
    return Setup(
        config=config,
        device=device,
        world=world,
        model=model,
        trainee=Trainee(
            body=body,
            head=head,
            parameters=tuple(p for p in model.parameters() if p.requires_grad),
            optimizer=adamw(model, config.optim, lr),
            objective=_objective(config.objective, store.vocab_size, hub.logit_transform(model)),
            teacher=teacher,
            gate=make_gate(config.objective.gate),
            clip=config.optim.clip,
            autocast=_autocast(config, device),
        ),
        policy=make_policy(
            config.objective.alpha,
            partial(learning_rate, config.optim, 1.0, batch_tokens=config.global_batch_tokens),
        ),
        loader=_loader(config, store, world, steps),
        steps=steps,
        lr=lr,
        micro_sequences=min(micro, sequences // world.size),
        checkpoint_tokens=config.checkpoint.every,
        parameters=parameters,
        student_flops=3 * hub.forward_flops(model, config.data.sequence_length),
        base=student.base,
        notes=(*student.notes, *(teacher.notes if teacher is not None else ())),
    )


def _check_stage(config: RunConfig, store: Store) -> None:
    if config.stage == "sft" and not store.manifest.masked:
        raise UserError(
            f"stage = sft: in {store.path} every token counts, there are no prompts; build the store from "
            "sources of kind pairs, hub_pairs or corpus_pairs"
        )
    if config.stage == "pretrain" and store.manifest.masked:
        raise UserError(
            f"stage = pretrain: {store.path} holds prompts, which carry no loss; set stage: sft and "
            "model.path, or use a store of plain text"
        )


def _loader(config: RunConfig, store: Store, world: distributed.World, steps: int) -> Loader:
    loader = Loader(
        store.split("train"),
        sequence_length=config.data.sequence_length,
        sequences_per_step=config.global_batch_tokens // config.data.sequence_length,
        seed=config.data.seed,
        rank=world.rank,
        world_size=world.size,
    )
    if empty := loader.unlabelled(steps):
        raise UserError(
            f"{store.path}: {empty} of the {steps} steps would see no token of a completion, so there is "
            "nothing to learn from; raise global_batch_tokens or data.sequence_length"
        )
    return loader


def _objective(config: ObjectiveConfig, vocab_size: int, student_logits: LogitTransform) -> Objective:
    cut = config.truncation
    truncation = None if cut is None else TopK(cut.k) if isinstance(cut, TopKTruncation) else TopP(cut.p)
    return Objective(
        divergence=config.divergence,
        temperature=config.temperature,
        temperature_squared=config.temperature_squared,
        mixing=config.mixing,
        tail=config.tail,
        jsd_beta=config.jsd_beta,
        skew=config.skew,
        truncation=truncation,
        student_logits=student_logits,
        vocab_size=vocab_size,
        chunk_tokens=config.chunk_tokens,
    )


def _student(config: RunConfig, store: Store) -> _Student:
    length, attention = config.data.sequence_length, config.model.attn_implementation
    if config.model.rung is not None:
        rung = shapes.rung(config.model.rung)
        model = hub.build(rung, store.vocab_size, length, config.seed, attn_implementation=attention)
        return _Student(model, config.optim.lr or rung.lr, None, ())
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
    model = hub.load(path, config.model.revision, torch.float32, attention)
    model.get_input_embeddings().padding_idx = None  # nothing is padded here, so no token may stand still
    beyond = check_length(model, what, length)
    tokenizer.check_rows(what, model.get_output_embeddings().weight.shape[0], store)
    notes = tokenizer.notes if beyond is None else (*tokenizer.notes, beyond)
    base = Base(tokenizer.directory, tokenizer=tokenizer.is_the_stores)
    return _Student(model, config.optim.lr or _FALLBACK_LR, base, notes)


def _start(config: RunConfig) -> str:
    """Where the weights lie that the run goes on from."""
    if config.model.path is not None:
        return config.model.path
    path = config.output / str(config.model.run) / "model"
    if not path.is_dir():
        raise UserError(
            f"model.run {config.model.run}: {path} does not exist; train that run to its end first"
        )
    return str(path)


def _teacher(config: RunConfig, store: Store, device: torch.device) -> Teacher:
    assert config.teacher is not None  # noqa: S101 - asked for only if there is one
    half = _autocast(config, device) == torch.bfloat16
    context = TeacherContext(
        store,
        config.output,
        config.data.sequence_length,
        device,
        dtype="bfloat16" if half else "float32",
        objective=config.objective,
    )
    return make_teacher(config.teacher, context)


def _steps(config: RunConfig, parameters: int) -> int:
    try:
        return config.steps(parameters)
    except ValueError as error:
        raise UserError(f"run {config.name}: {error}") from None


def _autocast(config: RunConfig, device: torch.device) -> torch.dtype | None:
    wanted = config.dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else None
