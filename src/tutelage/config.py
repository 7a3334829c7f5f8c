"""Every setting of a training run: strict, frozen, each field with its unit.

Unknown keys and wrong types are errors. YAML is read and errors are worded by `tutelage.configio`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tutelage.cacheformats import CacheSettings, misfit
from tutelage.objectiveconfig import ObjectiveConfig, WsdAlpha
from tutelage.settings import Budget, Fraction, Name, Section, check_plain_tokens, check_tokens
from tutelage.types import Role

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""How attention is computed, in transformers' words."""


class _Loaded(Section):
    """What can be said of any model that is loaded."""

    attn_implementation: Attention | None = Field(
        None, description="how attention is computed; default: what transformers chooses for the family"
    )
    assume_same_tokenizer: bool = Field(
        default=False,
        description="you know that its ids are the token store's, although it comes without a tokenizer",
    )


class ModelConfig(_Loaded):
    """The student: a rung of the ladder with fresh weights, or a model to go on from."""

    rung: str | None = Field(None, description="name of a shape; `tutelage models` lists them")
    path: str | None = Field(None, description="Hugging Face directory or Hub name to continue training")
    run: str | None = Field(None, description="finished run in the same output directory to go on from")

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        if sum(given is not None for given in (self.rung, self.path, self.run)) != 1:
            raise ValueError("give exactly one of 'rung', 'path' and 'run'")
        return self


class RunData(Section):
    """Which tokens, in which order."""

    store: Path = Field(description="token store written by `tutelage data build`")
    seed: int = Field(42, ge=0, description="seed of the order; runs to compare share it")
    sequence_length: int = Field(128, ge=2, description="tokens per packed sequence")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float | None = Field(
        None, gt=0, description="peak learning rate; default: the rung's tuned one, 1e-5 in stage sft"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW beta1, beta2")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only, not on norms and biases")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: Fraction | str = Field(
        0.05,
        union_mode="left_to_right",
        description="linear warm-up: fraction of the steps, or tokens ('2M'); default in stage sft: 0.01",
    )
    decay: Fraction = Field(0.2, description="fraction of steps of linear decay at the end (wsd only)")
    final_lr: Fraction = Field(0.1, description="learning rate at the last step, as a fraction of the peak")

    @field_validator("warmup")
    @classmethod
    def _budget(cls, warmup: float | str) -> float | str:
        if isinstance(warmup, str):
            check_plain_tokens(warmup)
        return warmup


class _Kept(_Loaded):
    cache: CacheSettings | None = Field(
        None,
        description="compute its targets once and keep them in caches/ beside the output; default: live",
    )


class RunTeacher(_Kept):
    """A teacher that is a finished run in the same output directory."""

    kind: Literal["run"]
    run: str = Field(description="run id, the name of its directory")


class ModelTeacher(_Kept):
    """A teacher that is any causal language model in Hugging Face format with the same vocabulary."""

    kind: Literal["model"]
    path: str = Field(description="directory or Hub name")
    revision: str | None = Field(None, description="commit or tag on the Hub")


class ControlTeacher(Section):
    """A control without knowledge of context: the corpus unigram, or the uniform distribution.

    The uniform control makes the objective label smoothing with strength alpha.
    """

    kind: Literal["unigram", "uniform"]


class CacheTeacher(Section):
    """Targets computed before, by `tutelage teach`."""

    kind: Literal["cache"]
    path: Path = Field(description="teacher cache written by `tutelage teach` for the same token store")


LiveTeacher = Annotated[RunTeacher | ModelTeacher | ControlTeacher, Field(discriminator="kind")]
Teacher = Annotated[RunTeacher | ModelTeacher | ControlTeacher | CacheTeacher, Field(discriminator="kind")]


class EvalDomain(Section):
    """One text to score, as a token store made with the training store's tokenizer."""

    name: Name = Field(description="name in tables and figures")
    store: Path = Field(description="token store; its validation and test splits are scored")
    role: Role = Field("out_of_domain", description="is this the training distribution?")


class EvalConfig(Section):
    """What is scored when a run ends, and on the way there."""

    every: Budget | None = Field(None, description="tokens between scorings; default: only at the end")
    domains: tuple[EvalDomain, ...] = ()
    max_documents: int = Field(200, ge=1, description="documents per domain and split")
    max_tokens: int = Field(4096, ge=1, description="tokens per document, from its beginning")

    @model_validator(mode="after")
    def _something(self) -> EvalConfig:
        if self.every is not None:
            check_plain_tokens(self.every)
            if not self.domains:
                raise ValueError("eval.every is set but eval.domains is empty; name a domain or drop 'every'")
        return self


class CheckpointConfig(Section):
    """How often the run can be taken up again."""

    every: Budget = Field("100M", description="tokens between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints to keep")
    trunk: bool = Field(
        default=False,
        description="keep one more, where the decay begins (wsd), for longer runs to start from",
    )

    _check = field_validator("every")(check_plain_tokens)


class RuntimeConfig(Section):
    """Where it runs; nothing here changes what is computed, up to rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, mps, then cpu")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: torch's own choice")
    log_every: int = Field(20, ge=1, description="steps between rows of metrics.jsonl")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="also send the rows there (extra `trackers`)"
    )
    trunk: str | None = Field(
        None,
        description="shorter run with checkpoint.trunk in the same output directory, to start from: it has "
        "computed the same steps up to its decay",
    )


_SFT_LR, _SFT_WARMUP = 1e-5, 0.01
"""The paper's, for its 1.7B students."""


NOT_THE_RESULT = {"name", "eval", "checkpoint", "runtime", "output", "micro_batch_tokens"}
"""Fields of a run that do not change the trained weights."""


class RunConfig(Section):
    """One training run. Its directory is `<output>/<name>-<hash8>`; same config, same directory."""

    name: Name = Field("run", description="readable part of the directory name; not part of the hash")
    stage: Literal["pretrain", "sft"] = Field(
        "pretrain",
        description="sft: fine-tune model.path, loss on completions only; the store is one of pairs",
    )
    seed: int = Field(43, ge=0, description="seed of the initial weights and of dropout")
    model: ModelConfig
    data: RunData
    tokens: Budget = Field(description="training tokens: a number, '50M' or '20x' (per parameter)")
    global_batch_tokens: int = Field(1024, ge=2, description="tokens per optimizer step, over all ranks")
    micro_batch_tokens: int | None = Field(None, ge=2, description="tokens per forward; default: all at once")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto: bfloat16 on cuda, float32 elsewhere; weights are float32"
    )
    optim: OptimConfig = Field(OptimConfig(), validate_default=True)
    teacher: Teacher | None = Field(None, description="no teacher: plain cross-entropy")
    objective: ObjectiveConfig = ObjectiveConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: Path = Field(Path("runs"), description="directory that holds run directories")

    _check = field_validator("tokens")(check_tokens)

    @field_validator("optim")
    @classmethod
    def _sft_defaults(cls, optim: OptimConfig, info: ValidationInfo) -> OptimConfig:
        """Fill in what fine-tuning does differently, so that config.yaml says what was used."""
        if info.data.get("stage") != "sft":
            return optim
        warmup = optim.warmup if "warmup" in optim.model_fields_set else _SFT_WARMUP
        return optim.model_copy(update={"lr": optim.lr or _SFT_LR, "warmup": warmup})

    @model_validator(mode="after")
    def _staged(self) -> RunConfig:
        if self.stage == "sft" and self.model.rung is not None:
            raise ValueError(
                "stage = sft goes on from a trained model; give model.path, a model directory, or model.run, "
                "a run's id, not model.rung"
            )
        return self

    @model_validator(mode="after")
    def _branching(self) -> RunConfig:
        """Up to the decay, runs that differ in their budget are one, if nothing else depends on it."""
        trunk = self.runtime.trunk is not None
        if (trunk or self.checkpoint.trunk) and self.optim.schedule != "wsd":
            raise ValueError(f"a trunk needs optim.schedule = wsd, not {self.optim.schedule}")
        if trunk and not isinstance(self.optim.warmup, str):
            raise ValueError(
                f"runtime.trunk: optim.warmup = {self.optim.warmup} depends on the budget; give it in tokens"
            )
        if trunk and self.teacher is not None:
            raise ValueError("runtime.trunk: a run with a teacher starts at its beginning; drop one of them")
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
        return self

    @model_validator(mode="after")
    def _taught(self) -> RunConfig:
        objective, teaches = self.objective, self.objective.teaches
        gate = objective.gate.kind if objective.gate is not None else None
        if teaches and self.teacher is None:
            raise ValueError(
                "objective.alpha is above 0 but there is no teacher; add 'teacher' or drop alpha"
            )
        if self.teacher is not None and not teaches:
            raise ValueError("there is a teacher but objective.alpha is 0; raise alpha or drop 'teacher'")
        if gate is not None and not teaches:
            raise ValueError(
                "there is an objective.gate but objective.alpha is 0; raise alpha or drop 'gate'"
            )
        if isinstance(self.teacher, RunTeacher | ModelTeacher) and (cache := self.teacher.cache) is not None:
            reason = misfit(cache.format, cache.temperature, objective, "teacher.cache")
            if reason is not None:
                raise ValueError(reason)
        if isinstance(self.teacher, ControlTeacher) and gate == "teacher_entropy":
            raise ValueError(
                f"objective.gate.kind = teacher_entropy sorts tokens, but the {self.teacher.kind} teacher is "
                "equally uncertain about all; choose another gate or teacher"
            )
        if isinstance(objective.alpha, WsdAlpha) and self.optim.schedule != "wsd":
            raise ValueError(
                f"objective.alpha.policy = wsd follows the learning rate, but optim.schedule = "
                f"{self.optim.schedule}; set it to wsd"
            )
        return self
