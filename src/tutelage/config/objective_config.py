"""Settings of the objective: the loss, the alpha policy, the per-token gate. No torch.

Alpha policies that depend on the step alone are written here, as `at` of their section; those that follow the
training statistics are in `tutelage.objective.alpha`, gates in `tutelage.objective.gates`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.base import Fraction, Inside, Section

if TYPE_CHECKING:
    from torch import Tensor

Temperature = Annotated[float, Field(ge=0.01, le=100.0)]
"""T of both models' softmax in the divergence. Beyond these bounds float32 holds too little of the loss: T^2
times a rounding error of 1e-7 is 0.001 nats at 100."""


class ConstantAlpha(Section):
    """The same alpha at every step, as in arXiv 2605.23857."""

    policy: Literal["constant"] = "constant"
    value: Fraction = Field(description="weight of the distillation loss; 1 - value weighs cross-entropy")

    def at(self, progress: float) -> float:
        """Return `value` at any progress."""
        del progress
        return self.value

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.value


class PiecewiseAlpha(Section):
    """Alpha interpolated linearly between knots, flat before the first and after the last."""

    policy: Literal["piecewise"]
    knots: tuple[tuple[Fraction, Fraction], ...] = Field(
        min_length=1, description="pairs [fraction of the run, alpha], fractions rising"
    )

    @field_validator("knots", mode="before")
    @classmethod
    def _tuples(cls, knots: object) -> object:
        """Take lists too: behind the shorthand for a number, pydantic no longer knows this was JSON."""
        if not isinstance(knots, list | tuple):
            return knots
        return tuple(tuple(knot) if isinstance(knot, list) else knot for knot in knots)

    @field_validator("knots")
    @classmethod
    def _rising(cls, knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(a[0] >= b[0] for a, b in pairwise(knots)):
            raise ValueError("fractions must rise from knot to knot")
        return knots

    def at(self, progress: float) -> float:
        """Interpolate between the knots beside `progress`."""
        import numpy as np  # noqa: PLC0415 - configs are read without it

        fractions, alphas = zip(*self.knots, strict=True)
        return float(np.interp(progress, fractions, alphas))

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(alpha for _, alpha in self.knots)


class _FromTo(Section):
    start: Fraction = Field(description="alpha at the first step")
    end: Fraction = Field(description="alpha at the last step")

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(self.start, self.end)


class LinearAlpha(_FromTo):
    """A straight line over the whole run.

    Falling, it is the linear decay of arXiv 2410.16215; rising, the curriculum of arXiv 2605.26246.
    """

    policy: Literal["linear"]

    def at(self, progress: float) -> float:
        """Return start + progress (end - start)."""
        return (1.0 - progress) * self.start + progress * self.end


class CosineAlpha(_FromTo):
    """Half a cosine over the whole run: a line with flat ends (shape of arXiv 1608.03983)."""

    policy: Literal["cosine"]

    def at(self, progress: float) -> float:
        """Weigh the start by (1 + cos(pi progress)) / 2 and the end by the rest."""
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return share * self.start + (1.0 - share) * self.end


class TwoPhaseAlpha(Section):
    """One alpha, then another.

    The controls .1 -> .3 and .3 -> .1 give the same amount of teaching in opposite orders: they test whether
    a gain over the constant of arXiv 2605.23857 comes from the order and not from the mean.
    """

    policy: Literal["two_phase"]
    first: Fraction = Field(description="alpha before the switch")
    second: Fraction = Field(description="alpha from the switch on")
    switch: Inside = Field(default=0.5, description="fraction of the run at which alpha changes")

    def at(self, progress: float) -> float:
        """Return `first` before the switch, `second` from there on."""
        return self.first if progress < self.switch else self.second

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return max(self.first, self.second)


class WsdAlpha(Section):
    """Alpha in proportion to a warm-up-stable-decay learning rate; needs optim.schedule = wsd.

    This did best in the design space of arXiv 2410.16215.
    """

    policy: Literal["wsd"]
    peak: Fraction = Field(description="alpha while the learning rate is at its peak")

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.peak


class SaltAlpha(Section):
    """Distillation first, then plain cross-entropy at its usual cost (SALT, arXiv 2410.18779)."""

    policy: Literal["salt"]
    value: Fraction = Field(description="alpha of the distillation stage")
    until: Inside = Field(description="fraction of the run at which the teacher is dropped")

    def at(self, progress: float) -> float:
        """Return `value` until the teacher is dropped, then 0."""
        return self.value if progress < self.until else 0.0

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.value


class _Bounded(Section):
    cap: Inside = Field(default=0.9, description="largest alpha")
    floor: Fraction = Field(default=0.1, description="smallest alpha")

    @model_validator(mode="after")
    def _ordered(self) -> _Bounded:
        if self.floor > self.cap:
            raise ValueError(f"floor ({self.floor}) must not be above cap ({self.cap})")
        return self

    @property
    def highest(self) -> float:
        """Largest alpha of the run."""
        return self.cap


class GapDrivenAlpha(_Bounded):
    """Alpha in proportion to the student's gap to the teacher."""

    policy: Literal["gap_driven"]
    scale: float = Field(
        default=0.5, ge=1e-6, le=1e6, description="gap in nats per token that asks for alpha 1"
    )
    window: int = Field(
        default=20, ge=1, le=10**9, description="steps over which cross-entropies are averaged"
    )


class PrequentialAlpha(_Bounded):
    """Alpha from a bet between teacher and student, settled on label-only probe steps."""

    policy: Literal["prequential"]
    floor: Inside = Field(
        default=0.1, description="smallest alpha outside probes; above 0, or it could not recover"
    )
    period: int = Field(default=50, ge=3, le=10**9, description="steps from one probe to the next")
    probe: int = Field(
        default=5, ge=2, description="label-only steps (alpha 0) at the beginning of each period"
    )
    rate: float = Field(
        default=5.0, gt=0, le=1e6, description="change of the log-odds per nat and scored step"
    )

    @model_validator(mode="after")
    def _room_to_teach(self) -> PrequentialAlpha:
        if self.probe >= self.period:
            raise ValueError(f"probe ({self.probe}) must be shorter than period ({self.period})")
        return self


AlphaConfig = Annotated[
    ConstantAlpha
    | PiecewiseAlpha
    | LinearAlpha
    | CosineAlpha
    | TwoPhaseAlpha
    | WsdAlpha
    | SaltAlpha
    | GapDrivenAlpha
    | PrequentialAlpha,
    Field(discriminator="policy"),
]


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


GateConfig = Annotated[
    TeacherBetterGate | StudentEntropyGate | TeacherEntropyGate | TeacherConfidenceGate,
    Field(discriminator="kind"),
]


class TopK(Section):
    """Keep the teacher's k most probable tokens."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(ge=1, le=1_000_000, description="tokens to keep; at most the vocabulary")


class TopP(Section):
    """Keep the fewest most probable tokens whose probabilities reach p (arXiv 1904.09751)."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(gt=0.0, le=1.0, description="teacher mass to keep")


Truncation = Annotated[TopK | TopP, Field(discriminator="kind")]


_CHUNK_BYTES = {"cpu": 38 * 2**20, "mps": 128 * 2**20}
_ACCELERATOR_BYTES = 256 * 2**20
"""Size of one [chunk, V] float32 buffer. A head is read from memory once per chunk and product, so small
chunks are slow; docs/performance.md has the trade between time and memory."""
_DENSE = 1.6
"""A dense teacher's head is wider and is read once more per chunk, so its chunks are larger."""
_TEMPORARIES = 8
"""Forward KL works in place; the other divergences hold many temporaries, so their chunks are smaller."""


class Objective(Section):
    """Cross-entropy, a divergence from the teacher, and how a given alpha mixes them.

    T^2 keeps the gradient of the divergence from shrinking as T grows (Hinton et al., arXiv 1503.02531). The
    divergence `hard_labels` is forward KL from the teacher's argmax, at T=1 and without T^2. Label smoothing
    changes CE alone; the z-loss is added whatever alpha is.
    """

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "hard_labels"
    ] = Field(default="forward_kl", description="D; forward_kl is KL(teacher || student)")
    mixing: Literal["convex", "keep_full_ce", "keep_full_kd"] = Field(
        default="convex",
        description="convex, or CE + alpha D (keep_full_ce), or (1 - alpha) CE + D (keep_full_kd)",
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
        default=None, ge=1, le=2**30, description="tokens per head+loss chunk; default: by V"
    )

    @model_validator(mode="after")
    def _unbiased(self) -> Objective:
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
        return max(8, int(size * _DENSE if dense else size))

    def weights(self, alpha_N: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of CE, weight of the divergence without T^2) for an alpha per token."""
        one_N = alpha_N.new_ones(alpha_N.shape)
        ce_N = one_N if self.mixing == "keep_full_ce" else 1 - alpha_N
        return ce_N, one_N if self.mixing == "keep_full_kd" else alpha_N


class ObjectiveConfig(Objective):
    """(1 - alpha) CE + alpha T^2 D(teacher, student), means over valid tokens (arXiv 2605.23857)."""

    alpha: AlphaConfig = Field(
        default=ConstantAlpha(value=0.0), description="a number, or a policy with its settings"
    )
    gate: GateConfig | None = Field(default=None, description="factor on alpha per token; default: 1")

    @field_validator("alpha", mode="before", json_schema_input_type=Fraction | AlphaConfig)
    @classmethod
    def _number_is_constant(cls, alpha: object) -> object:
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            return {"policy": "constant", "value": alpha}
        if not isinstance(alpha, dict | Section):
            raise ValueError("write a number, 0.4, or a policy with its settings")  # noqa: TRY004 - pydantic's
        return alpha

    @property
    def teaches(self) -> bool:
        """Whether a teacher has any weight at any step."""
        return self.alpha.highest > 0 or self.mixing == "keep_full_kd"

    @model_validator(mode="after")
    def _always_taught(self) -> ObjectiveConfig:
        if self.mixing == "keep_full_kd" and isinstance(self.alpha, SaltAlpha | PrequentialAlpha):
            raise ValueError(
                f"alpha.policy = {self.alpha.policy} has steps without a teacher, but mixing = keep_full_kd "
                "always teaches; use convex or keep_full_ce"
            )
        return self
