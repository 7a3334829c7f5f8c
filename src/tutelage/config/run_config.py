"""Settings of a training run: model, data, budget, optimizer, evaluation."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tutelage.config.alpha_config import WsdAlpha
from tutelage.config.base import (
    BatchTokens,
    Budget,
    FilePath,
    Fraction,
    Length,
    Name,
    RunName,
    Section,
    Seed,
    TokenCount,
    in_reference,
    parse_tokens,
    refuse_alike,
    tokens_text,
    whole_batches,
)
from tutelage.config.objective_config import ObjectiveConfig
from tutelage.config.runtime_config import CheckpointConfig, ParallelConfig, RuntimeConfig
from tutelage.config.teacher_config import (
    LoadedModel,
    MeanTeacher,
    ModelTeacher,
    RunTeacher,
    TeacherConfig,
    incompatibility,
    masks_documents,
    single_teachers,
    sorts_in_vain,
)
from tutelage.types import RECALL, Role


class ModelConfig(LoadedModel):
    """The student: a shape of the ladder with random weights, or a model to continue from."""

    shape: Name | None = Field(default=None, description="name of a shape; `tutelage models` lists them")
    path: str | None = Field(
        default=None, description="Hugging Face directory or Hub name to continue training"
    )
    revision: str | None = Field(
        default=None, description="commit or tag on the Hub; default: what main is when the run is asked for"
    )
    run: RunName | None = Field(
        default=None, description="finished run in the same output directory to continue from, by name"
    )

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        named = {"shape": self.shape, "path": self.path, "run": self.run}
        if len(given := [name for name, value in named.items() if value is not None]) != 1:
            found = f"{' and '.join(given)} are given; null takes one back" if given else "none is given"
            raise ValueError(f"give exactly one of 'shape', 'path' and 'run'; {found}")
        return self


class RunData(Section):
    """The training tokens and their order."""

    store: FilePath = Field(description="token store written by `tutelage data build`, by name or path")
    seed: Seed = Field(default=42, description="seed of the order; runs to compare share it")
    sequence_length: Length = Field(default=128, description="tokens per packed sequence")
    document_mask: bool | None = Field(
        default=None,
        validate_default=True,
        description="keep the documents of a packed sequence apart: each is read as if it were alone, by "
        "student and teacher; default: on for sequences of 1,024 tokens or more",
    )

    @field_validator("document_mask")
    @classmethod
    def _masked_if_long(cls, mask: bool | None, info: ValidationInfo) -> bool:
        return masks_documents(mask, info.data.get("sequence_length", 0))


class EvalDomain(Section):
    """One text to score, as a token store made with the training store's tokenizer."""

    name: Name = Field(description="name in tables and figures")
    store: FilePath = Field(description="token store; its validation and test splits are scored")
    role: Role = Field(default="out_of_domain", description="is this the training distribution?")


class EvalConfig(Section):
    """Scoring at the end of a run and during it."""

    every: TokenCount | None = Field(
        default=None, examples=["20M"], description="tokens between scorings; default: only at the end"
    )
    domains: tuple[EvalDomain, ...] = Field(default=(), description="texts to score")
    max_documents: int = Field(default=200, ge=1, le=10**9, description="documents per domain and split")
    max_tokens: int = Field(
        default=4096, ge=1, le=10**9, description="tokens per document, from its beginning"
    )
    recall: bool = Field(
        default=False,
        description="ask for facts of the training text too, by how often the run has read them",
    )

    @model_validator(mode="after")
    def _something(self) -> EvalConfig:
        if self.every is not None and not (self.domains or self.recall):
            raise ValueError("eval.every is set but eval.domains is empty; name a domain or drop 'every'")
        refuse_alike("domains", [*(domain.name for domain in self.domains), *[RECALL] * self.recall])
        return self


def _fraction_or_tokens(warmup: object) -> object:
    """Keep a fraction as a number, and bring tokens to the form that is hashed, such as "40K"."""
    if isinstance(warmup, bool) or not isinstance(warmup, int | float | str):
        raise ValueError("write a fraction of the steps, 0.05, or tokens, '2M'")  # noqa: TRY004 - pydantic's
    if isinstance(warmup, str):
        return tokens_text(parse_tokens(warmup))
    if warmup < 0:
        raise ValueError("must not be negative")
    if warmup <= 1:
        return float(warmup)
    if isinstance(warmup, float) and not warmup.is_integer():
        raise ValueError("a fraction of the steps is at most 1, and tokens are whole: write '2M'")
    return tokens_text(parse_tokens(int(warmup)))


Warmup = Annotated[
    Fraction | str,
    BeforeValidator(
        _fraction_or_tokens,
        json_schema_input_type=Annotated[float | str, in_reference("fraction from 0 to 1, or tokens: 2M")],
    ),
]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float | None = Field(
        default=None,
        examples=[0.001],
        gt=0,
        le=1e30,
        description="peak learning rate; default: the shape's tuned one, 3e-4 from model.path or model.run, "
        "1e-5 in stage sft",
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW beta1, beta2")
    eps: float = Field(default=1e-8, ge=1e-30, le=1, description="AdamW epsilon")
    weight_decay: float = Field(
        default=0.1, ge=0, le=1e3, description="on matrices, embeddings too, not on norms and biases"
    )
    clip: float = Field(default=1.0, ge=1e-30, le=1e30, description="largest global gradient norm")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup: Warmup = Field(
        default=0.05,
        description="linear warm-up, a fraction of the steps or in tokens; default in stage sft: 0.01",
    )
    decay: Fraction = Field(
        default=0.2, description="fraction of steps of linear decay at the end (wsd only)"
    )
    final_lr: Fraction = Field(
        default=0.1, description="learning rate at the last step, as a fraction of the peak (not constant)"
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> OptimConfig:
        if self.schedule != "wsd" or isinstance(self.warmup, str):
            return self
        if (both := self.warmup + self.decay) > 1 + 1e-9:
            raise ValueError(
                f"warmup ({self.warmup:g}) and decay ({self.decay:g}) take {both:g} of the run together, so "
                "the learning rate would fall before it has risen; make them 1 or less"
            )
        return self

    def warmup_steps(self, steps: int, batch_tokens: int) -> int:
        """Steps of linear warm-up in a run of `steps`, each of `batch_tokens`."""
        if isinstance(self.warmup, str):
            return math.ceil(parse_tokens(self.warmup) / batch_tokens)
        return math.ceil(Decimal(repr(self.warmup)) * steps)  # as written: 0.07 of 100 steps is 7, not 8

    def decay_steps(self, steps: int) -> int:
        """Steps of linear decay at the end of a wsd run of `steps`."""
        return max(1, round(self.decay * steps)) if self.decay else 0

    def decay_start(self, steps: int, batch_tokens: int) -> int:
        """The first step of the linear decay of a wsd run; `steps` if there is none."""
        return max(self.warmup_steps(steps, batch_tokens), steps - self.decay_steps(steps))

    def vanishes(self, steps: int, batch_tokens: int) -> bool:
        """Whether a wsd run ends on a learning rate of 0."""
        return self.final_lr == 0 and self.decay_start(steps, batch_tokens) < steps

    def check_fits(self, steps: int, batch_tokens: int) -> None:
        """Raise ValueError if a run of `steps` has no room for the warm-up and what comes after it."""
        warmup = self.warmup_steps(steps, batch_tokens)
        after = {"constant": 0, "cosine": 1, "wsd": self.decay_steps(steps)}[self.schedule]
        if not isinstance(self.warmup, str):  # rounding may make parts of a fitting whole overlap by a step
            after = int(after > 0 and self.warmup == 1)
        if warmup + after > steps:
            rest = f" and {self.schedule} after it at least {after}" if after else ""
            raise ValueError(
                f"optim.warmup = {self.warmup} takes {warmup:,} steps of {batch_tokens:,} tokens{rest}, but "
                f"the run has {steps:,} steps in all; shorten the warm-up, or train longer"
            )


_SFT_LR, _SFT_WARMUP = 1e-5, 0.01
"""The paper's, for its 1.7B students."""


NOT_THE_RESULT = {"name", "eval", "checkpoint", "parallel", "runtime", "output", "micro_batch_tokens"}
"""Fields of a run that do not change the trained weights."""


class RunConfig(Section):
    """One training run. Its directory is `<output>/<name>-<hash8>`; same config, same directory."""

    name: Name = Field(default="run", description="readable part of the directory name; not part of the hash")
    stage: Literal["pretrain", "sft"] = Field(
        default="pretrain",
        description="sft: fine-tune model.run or model.path on completions alone; the store is one of pairs",
    )
    seed: Seed = Field(default=43, description="seed of the initial weights and of dropout")
    model: ModelConfig
    data: RunData
    tokens: Budget = Field(description="training tokens")
    global_batch_tokens: BatchTokens = Field(
        default=1024, description="tokens per optimizer step, over all ranks"
    )
    micro_batch_tokens: BatchTokens | None = Field(
        default=None,
        examples=[512],
        description="tokens per forward; default: all at once (decides which units dropout drops)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="compute type; auto: bfloat16 on cuda, float32 elsewhere; weights are float32",
    )
    export_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the weights in model/; bfloat16 halves its size: what was trained is rounded, "
        "and scores, students and later runs get the rounded ones",
    )
    optim: OptimConfig = Field(default=OptimConfig(), validate_default=True)
    teacher: TeacherConfig | None = Field(default=None, description="no teacher: plain cross-entropy")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), validate_default=True)
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: FilePath = Field(default=Path("runs"), description="directory that holds run directories")

    @field_validator("optim")
    @classmethod
    def _sft_defaults(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        """Fill in the defaults of fine-tuning, so that config.yaml has the values that were used."""
        if info.data.get("stage") != "sft":
            return optim
        warmup = optim.warmup if "warmup" in optim.model_fields_set else _SFT_WARMUP
        return optim.model_copy(update={"lr": optim.lr or _SFT_LR, "warmup": warmup})

    @field_validator("objective")
    @classmethod
    def _default_alpha(cls, objective: ObjectiveConfig, info: ValidationInfo) -> ObjectiveConfig:
        return objective if info.data.get("teacher") is None else objective.with_default_alpha()

    @model_validator(mode="after")
    def _staged(self) -> RunConfig:
        if self.stage == "sft" and self.model.shape is not None:
            raise ValueError(
                "stage = sft continues from a trained model; give model.path, a model directory, or "
                "model.run, a run's id, not model.shape"
            )
        return self

    @model_validator(mode="after")
    def _branching(self) -> RunConfig:
        """Check that the steps before the decay do not depend on the budget."""
        branches = self.runtime.branch_from is not None
        if (branches or self.checkpoint.keep_before_decay) and self.optim.schedule != "wsd":
            raise ValueError(
                "checkpoint.keep_before_decay and runtime.branch_from need "
                f"optim.schedule = wsd, not {self.optim.schedule}"
            )
        if branches and not isinstance(self.optim.warmup, str):
            raise ValueError(
                f"runtime.branch_from: optim.warmup = {self.optim.warmup} depends on the budget; "
                "give it in tokens"
            )
        if branches and self.teacher is not None:
            raise ValueError(
                "runtime.branch_from: a run with a teacher starts at its beginning; drop one of them"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        length = self.data.sequence_length
        if self.global_batch_tokens % length:
            raise ValueError(
                f"global_batch_tokens ({self.global_batch_tokens}) must be a multiple of "
                f"data.sequence_length ({length})"
            )
        micro = self.micro_batch_tokens or self.global_batch_tokens
        if micro % length or self.global_batch_tokens % micro:
            raise ValueError(
                f"micro_batch_tokens ({micro}) must be a multiple of data.sequence_length ({length}) "
                f"and divide global_batch_tokens ({self.global_batch_tokens})"
            )
        if isinstance(self.tokens, int):
            self.steps(0)
        return self

    def steps(self, parameters: int) -> int:
        """Optimizer steps of the run, in whole batches: up to one batch less than `tokens` is trained.

        Args:
            parameters: of the model, for budgets such as "20x".

        Raises:
            ValueError: there are none, or too few for the learning rate's schedule.
        """
        tokens = parse_tokens(self.tokens, parameters)
        steps = tokens // self.global_batch_tokens
        if steps == 0:
            raise ValueError(
                f"tokens = {self.tokens}: {tokens:,} tokens are less than one batch of "
                f"{self.global_batch_tokens:,} (global_batch_tokens)"
            )
        self.optim.check_fits(steps, self.global_batch_tokens)
        return steps

    def rounding(self, steps: int, parameters: int) -> list[str]:
        """Describe how token counts are rounded to whole batches, and which lie beyond the run.

        Args:
            steps: optimizer steps of the run.
            parameters: of the model.
        """
        batch = self.global_batch_tokens
        trained = steps * batch
        notes = []
        if (asked := parse_tokens(self.tokens, parameters)) != trained:
            notes.append(
                f"tokens = {asked:,}: {trained:,} are trained, {steps:,} whole batches of {batch:,} tokens"
            )
        for field, every in (
            ("eval.every", self.eval.every),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep_every", self.checkpoint.keep_every),
        ):
            if every is not None and every % batch and every < trained:
                whole = whole_batches(every, batch) * batch
                notes.append(f"{field} = {every:,}: every {whole:,} tokens, in whole batches of {batch:,}")
        if self.eval.every is not None and self.eval.every >= trained:
            notes.append(
                f"eval.every = {self.eval.every:,}: the run has {trained:,} tokens and is scored at its end"
            )
        return notes

    @model_validator(mode="after")
    def _taught(self) -> RunConfig:
        objective, teaches, highest = self.objective, self.objective.teaches, self.objective.alpha.highest
        if teaches and self.teacher is None:
            field, is_so = ("alpha", "above 0") if highest > 0 else ("mixing", objective.mixing)
            raise ValueError(f"objective.{field} is {is_so} but there is no teacher; add one or drop {field}")
        if self.teacher is not None and not teaches:
            routed = objective.mixing == "routed"
            more = "set alpha: 1, as mixing = routed has it," if routed else "raise alpha"
            raise ValueError(f"there is a teacher but objective.alpha is 0; {more} or drop 'teacher'")
        if objective.gate is not None and highest == 0:
            raise ValueError(
                "there is an objective.gate but objective.alpha is 0; raise alpha or drop 'gate'"
            )
        live = self.teacher if isinstance(self.teacher, RunTeacher | ModelTeacher | MeanTeacher) else None
        if live is not None and (cache := live.cache) is not None:
            reason = incompatibility(cache.format, cache.temperature, objective, "teacher.cache")
            if reason is not None:
                raise ValueError(reason)
        reason = sorts_in_vain(objective, [one.kind for one in single_teachers(self.teacher)])
        if reason is not None:
            raise ValueError(reason)
        if isinstance(objective.alpha, WsdAlpha) and self.optim.schedule != "wsd":
            raise ValueError(
                f"objective.alpha.policy = wsd follows the learning rate, but optim.schedule = "
                f"{self.optim.schedule}; set it to wsd"
            )
        return self
