"""Settings of the objective: the loss and the per-token gate. No torch.

Alpha policies are in `tutelage.config.alpha_config`; what gates do, in `tutelage.objective.gates`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.alpha_config import (
    AlphaConfig,
    AutoAlpha,
    ConstantAlpha,
    PrequentialAlpha,
    SaltAlpha,
    TwoPhaseAlpha,
    taught_share,
)
from tutelage.config.base import Fraction, Inside, Section

if TYPE_CHECKING:
    from torch import Tensor

Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
"""T of both models' softmax in the divergence. Beyond these bounds float32 holds too little of the loss: T^2
times a rounding error of 1e-7 is 0.001 nats at 100."""


class TeacherBetterGate(Section):
    """Teach only tokens on which the teacher's cross-entropy is below the student's."""

    kind: Literal["teacher_better"]


class StudentEntropyGate(Section):
    """Teach only the tokens about which the student is most uncertain."""

    kind: Literal["student_entropy"]
    keep: Inside = Field(default=0.2, description="fraction of tokens that are taught")


class TeacherEntropyGate(Section):
    """Do not teach the tokens about which the teacher is most certain."""

    kind: Literal["teacher_entropy"]
    drop: Inside = Field(default=0.15, description="fraction of tokens that are not taught")


class TeacherConfidenceGate(Section):
    """Weigh each token by the teacher's largest probability."""

    kind: Literal["teacher_confidence"]


class TeacherCertaintyGate(Section):
    """Teach only the tokens about which the teacher is most certain."""

    kind: Literal["teacher_certainty"]
    keep: Inside = Field(default=0.2, description="fraction of tokens that are taught")


class TeacherAheadGate(Section):
    """Teach only the tokens on which the teacher's cross-entropy is furthest below the student's."""

    kind: Literal["teacher_ahead"]
    keep: Inside = Field(default=0.2, description="fraction of tokens that are taught")


class RandomGate(Section):
    """Teach tokens drawn at random: the control of every gate that chooses a fraction."""

    kind: Literal["random"]
    keep: Inside = Field(default=0.2, description="fraction of tokens that are taught")


GateConfig = Annotated[
    TeacherBetterGate
    | StudentEntropyGate
    | TeacherEntropyGate
    | TeacherConfidenceGate
    | TeacherCertaintyGate
    | TeacherAheadGate
    | RandomGate,
    Field(discriminator="kind"),
]


class TopK(Section):
    """Keep the teacher's k most probable tokens."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(examples=[50], ge=1, le=1_000_000, description="tokens to keep; at most the vocabulary")


class TopP(Section):
    """Keep the fewest most probable tokens whose probabilities reach p (arXiv 1904.09751)."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(gt=0.0, le=1.0, description="teacher mass to keep")


Truncation = Annotated[TopK | TopP, Field(discriminator="kind")]


_CHUNK_BYTES = {"cpu": 38 * 2**20, "mps": 128 * 2**20}
_ACCELERATOR_BYTES = 512 * 2**20
"""Size of one [chunk, V] float32 buffer. A head is read from memory once per chunk and product, so small
chunks are slow; docs/performance.md has the trade between time and memory."""
TILE = 128
"""Of this many tokens chunks on accelerators are a multiple: products are computed in tiles of that size."""
_DENSE = 1.6
"""A dense teacher's head is wider and is read once more per chunk, so its chunks are larger on the CPU."""
_TEMPORARIES = 8
"""Forward KL works in place; the other divergences hold many temporaries, so their chunks are smaller."""
_WHOLE = {"forward_kl": 0, "hard_labels": 2, "reverse_kl": 6, "tvd": 6}
_WHOLE_ELSE, _KEPT_ELSE, _TRUNCATING = 8, 4, {"top_k": 2, "top_p": 12}
"""Blocks as large as a chunk's logits that a divergence takes beside these: between whole distributions, over
kept ids and a bucket (forward KL and hard labels take none there), and to choose ids, which may be all."""
_OF_LOGITS = StudentEntropyGate | TeacherEntropyGate | TeacherCertaintyGate


class Objective(Section):
    """Cross-entropy, a divergence from the teacher, and how a given alpha mixes them.

    T^2 keeps the gradient of the divergence from shrinking as T grows (Hinton et al., arXiv 1503.02531). The
    divergence `hard_labels` is forward KL from the teacher's argmax, at T=1 and without T^2. Label smoothing
    changes CE alone; the z-loss is added whatever alpha is.
    """

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "hard_labels"
    ] = Field(default="forward_kl", description="D; forward_kl is KL(teacher || student)")
    mixing: Literal["convex", "keep_full_ce", "keep_full_kd", "routed"] = Field(
        default="convex",
        description="convex, or CE + alpha D (keep_full_ce), or (1 - alpha) CE + D (keep_full_kd), or D on "
        "tokens that the gate passes and CE on the others, each a mean over its own (routed)",
    )
    temperature: Temperature = Field(default=1.0, description="T, divides both models' logits inside D")
    temperature_squared: bool = Field(default=True, description="multiply D, value and gradient, by T^2")
    tail: Literal["other_bucket", "renormalise", "none"] = Field(
        default="other_bucket",
        description="teacher mass outside sparse targets: one bucket, spread, or left out",
    )
    truncation: Truncation | None = Field(
        default=None, description="truncate the teacher; default: all of it"
    )
    jsd_beta: Inside = Field(default=0.5, description="weight of the teacher in jsd's mixture")
    skew: Inside = Field(
        default=0.1, description="weight of the other model in the skewed divergences' mixture"
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="share of the label's mass spread evenly over the vocabulary in CE (arXiv 1512.00567)",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="weight of log(Z)^2, Z the student's sum of exp(logits); 1e-4 in PaLM (arXiv 2204.02311)",
    )
    chunk_tokens: int | None = Field(
        default=None,
        examples=[1024],
        ge=1,
        le=2**30,
        description="tokens whose logits exist at a time; default: by vocabulary and device",
    )

    @model_validator(mode="after")
    def _tailed(self) -> Objective:
        if self.tail == "renormalise" and self.divergence == "reverse_kl":
            raise ValueError(
                "tail = renormalise leaves the teacher no mass outside of the kept tokens, and reverse_kl is "
                "infinite where the student alone has some; use other_bucket"
            )
        if self.tail == "none" and self.divergence not in {"forward_kl", "hard_labels"}:
            raise ValueError(f"tail = none is unbiased for forward_kl only, not for {self.divergence}")
        return self

    @property
    def kd_scale(self) -> float:
        """Factor on the divergence: T^2 or 1."""
        squared = self.temperature_squared and self.divergence != "hard_labels"
        return self.temperature**2 if squared else 1.0

    def tokens_per_chunk(self, vocab_size: int, device: str, *, dense: bool) -> int:
        """Tokens whose logits exist at a time: as set, or by vocabulary, device and kind of targets."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        size = _CHUNK_BYTES.get(device, _ACCELERATOR_BYTES) / (4 * vocab_size)
        nucleus = self.truncation is not None and self.truncation.kind == "top_p"
        if self.divergence not in {"forward_kl", "hard_labels"} or nucleus:
            return max(8, int(size / _TEMPORARIES))
        if device not in _CHUNK_BYTES:
            return max(TILE, int(size) // TILE * TILE)
        return max(8, int(size * _DENSE if dense else size))

    def weights(self, alpha_N: Tensor, share: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """(weight of CE, weight of the divergence without T^2) for an alpha per token.

        Args:
            alpha_N: alpha times the gate.
            share: of `routed` alone: of the tokens that have alpha 1; 0 where none has. Sums are divided by
                the number of all tokens, so each loss becomes the mean over its own.
        """
        if self.mixing == "routed":
            return (1 - alpha_N) / (1 - share), alpha_N / (share + (share == 0))
        one_N = alpha_N.new_ones(alpha_N.shape)
        ce_N = one_N if self.mixing == "keep_full_ce" else 1 - alpha_N
        return ce_N, one_N if self.mixing == "keep_full_kd" else alpha_N


class ObjectiveConfig(Objective):
    """(1 - alpha) CE + alpha T^2 D(teacher, student), means over valid tokens (arXiv 2605.23857)."""

    alpha: AlphaConfig = Field(
        default=ConstantAlpha(value=0.0),
        description="a number, auto, or a policy with its settings; default with a teacher: auto, but 0 if "
        "mixing is keep_full_kd, and none if it is routed",
    )
    gate: GateConfig | None = Field(default=None, description="factor on alpha per token; default: 1")

    @field_validator("alpha", mode="before", json_schema_input_type=Fraction | Literal["auto"] | AlphaConfig)
    @classmethod
    def _number_is_constant(cls, alpha: object) -> object:
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            return {"policy": "constant", "value": alpha}
        if alpha == "auto":
            return {"policy": "auto"}
        if not isinstance(alpha, dict | Section):
            raise ValueError("write a number, 0.4, auto, or a policy with its settings")  # noqa: TRY004 - pydantic's
        return alpha

    def temporaries(self, *, dense: bool) -> int:
        """Blocks as large as a chunk's logits that divergence or gate hold beside these, at most.

        The labels' losses, which every gate is given, take one block; an entropy takes one more.

        Args:
            dense: whether the teacher's distributions are whole, not kept ids.
        """
        if not self.teaches:
            return 0
        divergence, gate = _WHOLE.get(self.divergence, _WHOLE_ELSE), 0
        if not dense or self.truncation is not None:
            in_place = self.divergence in {"forward_kl", "hard_labels"}
            divergence = 0 if in_place else _KEPT_ELSE
            if dense and self.truncation is not None:
                divergence = max(divergence, _TRUNCATING[self.truncation.kind])
        if self.gate is not None:
            gate = 1 + isinstance(self.gate, _OF_LOGITS if dense else StudentEntropyGate)
        return max(divergence, gate)

    @property
    def teaches(self) -> bool:
        """Whether a teacher has any weight at any step."""
        return self.alpha.highest > 0 or self.mixing == "keep_full_kd"

    def with_default_alpha(self) -> ObjectiveConfig:
        """The objective of a run with a teacher: alpha is `auto` if none was given that `mixing` asks for."""
        if "alpha" in self.model_fields_set or self.mixing in {"keep_full_kd", "routed"}:
            return self
        return self.model_copy(update={"alpha": AutoAlpha(policy="auto")})

    def taught_share(self, steps: int, *, lr_vanishes: bool) -> float:
        """Fraction of a run's steps on which its teacher is run, as `alpha_config.taught_share` has it."""
        return 1.0 if self.mixing == "keep_full_kd" else taught_share(self.alpha, steps, lr_vanishes)

    @model_validator(mode="after")
    def _routed(self) -> ObjectiveConfig:
        if self.mixing != "routed" or not self.teaches:
            return self
        if self.gate is None or isinstance(self.gate, TeacherBetterGate | TeacherConfidenceGate):
            kind = "there is none" if self.gate is None else f"{self.gate.kind} passes no set fraction"
            raise ValueError(
                "mixing = routed divides each loss by the fraction of tokens that objective.gate sends to "
                f"it, but {kind}; use teacher_certainty, teacher_ahead, teacher_entropy, student_entropy or "
                "random"
            )
        flat = self.alpha if isinstance(self.alpha, ConstantAlpha | SaltAlpha | TwoPhaseAlpha) else None
        if flat is None or not {flat.at(0.0), flat.at(1.0)} <= {0.0, 1.0}:
            raise ValueError(
                "mixing = routed gives a token either loss whole, so alpha is 1, or 0 in steps without a "
                "teacher: write 1, or two_phase or salt with the values 0 and 1"
            )
        return self

    @model_validator(mode="after")
    def _always_taught(self) -> ObjectiveConfig:
        if self.mixing == "keep_full_kd" and isinstance(self.alpha, SaltAlpha | PrequentialAlpha):
            raise ValueError(
                f"alpha.policy = {self.alpha.policy} has steps without a teacher, but mixing = keep_full_kd "
                "always teaches; use convex or keep_full_ce"
            )
        return self
