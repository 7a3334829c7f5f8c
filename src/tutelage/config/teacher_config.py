"""Settings of teachers: kinds, formats of stored targets, and the cache that `tutelage teach` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tutelage.config.base import BatchTokens, FilePath, Length, Name, RunName, Section, Seed, Threads
from tutelage.config.objective_config import Temperature, TopK, TopP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutelage.config.objective_config import ObjectiveConfig


class TopKFormat(Section):
    """The k most probable ids with their log-probabilities, and the mass of the rest."""

    kind: Literal["topk"]
    k: int = Field(examples=[50], ge=1, le=1_000_000, description="ids per position")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="stop earlier once their mass reaches this")


class MultinomialFormat(Section):
    """Draws with replacement, as ids and counts: random-sampling KD (arXiv 2503.16870)."""

    kind: Literal["sample_multinomial"]
    draws: int = Field(default=50, ge=1, le=4095, description="draws per position")


class MinVarianceFormat(Section):
    """Large probabilities exactly, small ones sampled at one common value, with least variance."""

    kind: Literal["sample_min_variance"] = "sample_min_variance"
    ids: int = Field(default=16, ge=1, le=1000, description="ids per position")


class HiddenFormat(Section):
    """The teacher's last hidden states, with its head stored once: dense targets without its forward."""

    kind: Literal["hidden"]
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        default="float16", description="of the stored states; int8 has one scale per position"
    )


Format = Annotated[
    TopKFormat | MultinomialFormat | MinVarianceFormat | HiddenFormat, Field(discriminator="kind")
]


class CacheSettings(Section):
    """Format and temperature of targets that are computed once for all students of a teacher."""

    format: Format = Field(default=MinVarianceFormat(), description="what is stored of each distribution")
    temperature: Temperature = Field(
        default=1.0, description="T of the stored probabilities; hidden serves every T"
    )


class LoadedModel(Section):
    """Settings of a model that is loaded from a directory or the Hub."""

    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(
        default=None,
        description="how attention is computed; default: what transformers chooses for the family",
    )
    assume_same_tokenizer: bool = Field(
        default=False,
        description="assert that its ids are the token store's, although it comes without a tokenizer",
    )


class _LanguageModelTeacher(LoadedModel):
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of its weights and what it computes in; auto: what the student computes in",
    )
    placement: Literal["shard", "replicate"] = Field(
        default="shard",
        description="on several processes: weights divided as the student's are and gathered layer by layer, "
        "or whole on each (more memory, no traffic: for a teacher that is small)",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="sharded: free a layer's gathered weights once it has been run; false keeps them until "
        "the step ends, for runs of several micro-batches with memory to spare",
    )
    cache: CacheSettings | None = Field(
        default=None,
        description="compute its targets once and store them in caches/ beside the output; default: live",
    )


class RunTeacher(_LanguageModelTeacher):
    """A teacher that is a finished run in the same output directory."""

    kind: Literal["run"]
    run: RunName = Field(description="its name, or as much of the beginning as no other has")


class ModelTeacher(_LanguageModelTeacher):
    """A teacher that is any causal language model in Hugging Face format with the same vocabulary."""

    kind: Literal["model"]
    path: str = Field(description="directory or Hub name")
    revision: str | None = Field(
        default=None, description="commit or tag on the Hub; default: what main is when the run is asked for"
    )


class ControlTeacher(Section):
    """A control without knowledge of context: the corpus unigram, or the uniform distribution.

    The unigram is that of what is learned: prompts do not count. The uniform control makes the objective
    label smoothing with strength alpha.
    """

    kind: Literal["unigram", "uniform"]


class CacheTeacher(Section):
    """Targets that `tutelage teach` has stored."""

    kind: Literal["cache"]
    path: FilePath = Field(
        description="teacher cache that `tutelage teach` wrote for the same token store, by name or path"
    )


SingleTeacher = RunTeacher | ModelTeacher | ControlTeacher | CacheTeacher


class MeanTeacher(Section):
    """The mean of several teachers' probabilities, (p_1 + ... + p_n) / n at T=1 (arXiv 1503.02531)."""

    kind: Literal["mean"]
    of: tuple[Annotated[SingleTeacher, Field(discriminator="kind")], ...] = Field(
        min_length=2,
        max_length=64,
        description="the teachers, of the same vocabulary; each runs beside the student",
    )
    cache: CacheSettings | None = Field(
        default=None,
        description="compute the mean once and store it in caches/ beside the output; default: live",
    )

    @model_validator(mode="after")
    def _whole(self) -> MeanTeacher:
        for place, part in enumerate(self.of):
            if not isinstance(part, RunTeacher | ModelTeacher):
                continue
            if part.cache is not None:
                raise ValueError(f"of[{place}].cache: what is cached is the mean; set cache beside 'of'")
            if self.cache is not None and part.dtype != "auto":
                raise ValueError(
                    f"of[{place}].dtype = {part.dtype}: a mean is cached in what the student computes in; "
                    "leave it out"
                )
        if self.cache is not None and isinstance(self.cache.format, HiddenFormat):
            raise ValueError(f"cache.format.kind = hidden: {_NOT_HIDDEN}")
        return self


_NOT_HIDDEN = "a mean of teachers has no hidden states; use topk, sample_multinomial or sample_min_variance"

LiveTeacher = Annotated[RunTeacher | ModelTeacher | ControlTeacher | MeanTeacher, Field(discriminator="kind")]
TeacherConfig = Annotated[SingleTeacher | MeanTeacher, Field(discriminator="kind")]


def each_teacher(
    teacher: TeacherConfig, change: Callable[[SingleTeacher, str], SingleTeacher]
) -> TeacherConfig:
    """Change a teacher, or each that a mean is of; `change` is told what it is called in messages."""
    if isinstance(teacher, MeanTeacher):
        of = tuple(change(part, f"teacher.of[{place}]") for place, part in enumerate(teacher.of))
        return teacher.model_copy(update={"of": of})
    return change(teacher, "teacher")


def single_teachers(teacher: TeacherConfig | None) -> tuple[SingleTeacher, ...]:
    """The teachers that a mean is of; another teacher alone; none without one."""
    if teacher is None:
        return ()
    return teacher.of if isinstance(teacher, MeanTeacher) else (teacher,)


def teacher_id(teacher: TeacherConfig) -> str:
    """Run, path or Hub name of a teacher as it was given, a control's kind, or those that a mean is of."""
    match teacher:
        case MeanTeacher(of=of):
            return ", ".join(teacher_id(part) for part in of)
        case RunTeacher(run=run):
            return run
        case ModelTeacher(path=path) | CacheTeacher(path=path):
            return str(path)
    return teacher.kind


class TeachConfig(CacheSettings):
    """One teacher cache. It lands in `<output>/<name>-<hash8>`; same config, same directory."""

    name: Name = Field(default="cache", description="readable part of the directory name")
    store: FilePath = Field(description="token store whose training split the teacher reads")
    teacher: LiveTeacher = Field(description="whose targets are kept")
    context_length: Length = Field(
        default=128,
        description="tokens the teacher sees; students use this sequence length or a divisor of it",
    )
    document_mask: bool | None = Field(
        default=None,
        validate_default=True,
        description="keep the documents of a context apart, as `data.document_mask` of the students does; "
        "default: on for contexts of 1,024 tokens or more",
    )
    seed: Seed = Field(default=0, description="seed of the sampler")
    compress: bool = Field(default=False, description="zstd per block, where it makes the block smaller")
    shard_tokens: int = Field(
        default=2**18, ge=1, le=2**40, description="tokens per file; a writer works on one file at a time"
    )
    batch_tokens: BatchTokens = Field(default=4096, description="tokens per teacher forward")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the teacher's weights and what it computes in"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="auto: cuda, mps, then cpu"
    )
    threads: Threads | None = Field(default=None, description="CPU threads; default: one per core at most")
    runs: FilePath = Field(
        default=Path("runs"), description="directory that holds the run of a teacher of kind run"
    )
    output: FilePath = Field(default=Path("caches"), description="directory of caches")

    @field_validator("teacher")
    @classmethod
    def _live(cls, teacher: LiveTeacher) -> LiveTeacher:
        if not isinstance(teacher, ControlTeacher) and teacher.cache is not None:
            raise ValueError("cache is for students; set format and temperature of this cache")
        for one in single_teachers(teacher):
            if isinstance(one, RunTeacher | ModelTeacher) and one.dtype != "auto":
                raise ValueError(f"dtype = {one.dtype} is for students; set dtype of this cache")
        return teacher

    @field_validator("document_mask")
    @classmethod
    def _masked_if_long(cls, mask: bool | None, info: ValidationInfo) -> bool:
        return masks_documents(mask, info.data.get("context_length", 0))

    @model_validator(mode="after")
    def _storable(self) -> TeachConfig:
        if isinstance(self.teacher, MeanTeacher) and isinstance(self.format, HiddenFormat):
            raise ValueError(f"format.kind = hidden: {_NOT_HIDDEN}")  # noqa: TRY004 - pydantic's
        return self

    @field_validator("format", mode="before")
    @classmethod
    def _default_kind(cls, value: object) -> object:
        """Take settings of a format without a kind for the default kind."""
        return {"kind": "sample_min_variance"} | value if isinstance(value, dict) else value


_MASKED_FROM = 1024
"""Tokens per sequence from which documents are kept apart if nothing is said."""


def masks_documents(setting: bool | None, length: int) -> bool:
    """Whether the documents of sequences of `length` tokens are kept apart; None: decided by the length."""
    return length >= _MASKED_FROM if setting is None else setting


def incompatibility(
    retained: Format, temperature: float, objective: ObjectiveConfig, where: str
) -> str | None:
    """Return a message if stored targets cannot serve an objective, else None.

    Args:
        retained: format of the stored targets.
        temperature: T of the stored probabilities.
        objective: of the student.
        where: the cache or setting with the targets, for the message.
    """
    if isinstance(retained, HiddenFormat):
        return None
    if objective.truncation is not None:
        return f"objective.truncation: the targets of {where} are sparse already ({retained.kind}); drop it"
    gate = None if objective.gate is None else objective.gate.kind
    if temperature != 1.0 and gate in {"teacher_entropy", "teacher_certainty", "teacher_confidence"}:
        return (
            f"objective.gate.kind = {gate}: needs the teacher at temperature 1, but {where} holds "
            f"probabilities at {temperature:g} ({retained.kind}); use a cache of format hidden, or another "
            "gate"
        )
    if objective.temperature != temperature and objective.divergence != "hard_labels":
        return (
            f"objective.temperature = {objective.temperature:g}: {where} holds probabilities at temperature "
            f"{temperature:g}; use that, or teach again at the other"
        )
    if isinstance(retained, MultinomialFormat | MinVarianceFormat) and objective.divergence != "forward_kl":
        return (
            f"objective.divergence = {objective.divergence}: samples ({retained.kind} in {where}) are "
            "unbiased for forward_kl only; use that, or a cache of format topk or hidden"
        )
    return None


def sorts_in_vain(objective: ObjectiveConfig, kinds: Sequence[str]) -> str | None:
    """Return a message if tokens or ids are to be sorted by what is the same for all of them, else None.

    Args:
        objective: of the student.
        kinds: of its teacher, or of those that a mean is of.
    """
    sorted_by = "divergence = hard_labels" if objective.divergence == "hard_labels" else "truncation"
    if set(kinds) == {"uniform"} and (sorted_by != "truncation" or objective.truncation is not None):
        return f"objective.{sorted_by}: the uniform teacher has no most probable ids; drop it"
    gate = None if objective.gate is None else objective.gate.kind
    controls = get_args(ControlTeacher.model_fields["kind"].annotation)
    if gate not in {"teacher_entropy", "teacher_certainty"} or not kinds or set(kinds) - set(controls):
        return None
    return (
        f"objective.gate.kind = {gate} sorts tokens, but the {kinds[0]} teacher is equally uncertain about "
        "all; choose another gate or teacher"
    )


def kd_name(objective: ObjectiveConfig, retained: Format | None) -> str:
    """Name the divergence among the metrics; quantities that are measured differently get different names.

    "kd" is KL(teacher || student) of whole distributions at T=1, in nats, and nothing else. Any other
    divergence, temperature or truncation of the teacher is appended, as in "kd_jsd_0.5_t2_top50". From
    samples it is not a divergence: it differs from one by a term that does not depend on the student.

    Args:
        objective: of the student.
        retained: format of the stored targets; None if the distributions are whole.
    """
    words = ["kd"]
    if objective.divergence != "forward_kl":
        words.append(objective.divergence)
    if objective.divergence == "jsd":
        words.append(f"{objective.jsd_beta:g}")
    if objective.divergence in {"skew_kl", "skew_reverse_kl"}:
        words.append(f"{objective.skew:g}")
    if objective.temperature != 1.0 and objective.divergence != "hard_labels":
        words += [f"t{objective.temperature:g}", *([] if objective.temperature_squared else ["unscaled"])]
    cut = _truncation_words(objective, retained)
    return "_".join([*words, *cut, *([objective.tail] if cut and objective.tail != "other_bucket" else [])])


def _truncation_words(objective: ObjectiveConfig, retained: Format | None) -> list[str]:
    """Describe how the teacher's distributions were truncated or sampled; empty if they are whole."""
    match objective.truncation or retained:
        case TopK(k=k):
            return [f"top{k}"]
        case TopP(p=p):
            return [f"top_p{p:g}"]
        case TopKFormat(k=k, top_p=p):
            return [f"top{k}", *([f"top_p{p:g}"] if p < 1 else [])]
        case MultinomialFormat(draws=draws):
            return [f"sampled{draws}"]
        case MinVarianceFormat(ids=ids):
            return [f"sampled{ids}_min_variance"]
    return []
