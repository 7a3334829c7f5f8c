"""Settings of the objective: the loss, the alpha policy, the per-token gate.

What each policy does is in `tutelage.objective.alpha` and `tutelage.objective.alpha`, each gate in
`tutelage.objective.gates`. This module imports no torch, so that a config can be read for free.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.base import Fraction, Inside, Section

COLDEST, HOTTEST = 0.01, 100.0
Temperature = Annotated[float, Field(ge=COLDEST, le=HOTTEST)]
"""T of both models' softmax in the divergence; beyond this, float32 holds too little of the loss."""


class ConstantAlpha(Section):
    """The same alpha at every step."""

    policy: Literal["constant"] = "constant"
    value: Fraction = Field(description="weight of the distillation loss; 1 - value weighs cross-entropy")

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return self.value


class PiecewiseAlpha(Section):
    """Alpha interpolated linearly between knots (fraction of the run, alpha)."""

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

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return max(alpha for _, alpha in self.knots)


class _FromTo(Section):
    start: Fraction = Field(description="alpha at the first step")
    end: Fraction = Field(description="alpha at the last step")

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return max(self.start, self.end)


class LinearAlpha(_FromTo):
    """A straight line over the whole run."""

    policy: Literal["linear"]


class CosineAlpha(_FromTo):
    """Half a cosine over the whole run: flat at both ends."""

    policy: Literal["cosine"]


class TwoPhaseAlpha(Section):
    """One alpha, then another."""

    policy: Literal["two_phase"]
    first: Fraction = Field(description="alpha before the switch")
    second: Fraction = Field(description="alpha from the switch on")
    switch: Inside = Field(0.5, description="fraction of the run at which alpha changes")

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return max(self.first, self.second)


class WsdAlpha(Section):
    """Alpha in proportion to a warm-up-stable-decay learning rate; needs optim.schedule = wsd."""

    policy: Literal["wsd"]
    peak: Fraction = Field(description="alpha while the learning rate is at its peak")

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return self.peak


class SaltAlpha(Section):
    """Distillation first, then plain cross-entropy."""

    policy: Literal["salt"]
    value: Fraction = Field(description="alpha of the distillation stage")
    until: Inside = Field(description="fraction of the run at which the teacher is dropped")

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return self.value


class _Bounded(Section):
    cap: Inside = Field(0.9, description="largest alpha")
    floor: Fraction = Field(0.1, description="smallest alpha")

    @model_validator(mode="after")
    def _ordered(self) -> _Bounded:
        if self.floor > self.cap:
            raise ValueError(f"floor ({self.floor}) must not be above cap ({self.cap})")
        return self

    @property
    def highest(self) -> float:
        """The largest alpha this policy can give."""
        return self.cap


class GapDrivenAlpha(_Bounded):
    """Alpha in proportion to the student's gap to the teacher."""

    policy: Literal["gap_driven"]
    scale: float = Field(0.5, ge=1e-6, le=1e6, description="gap in nats per token that asks for alpha 1")
    window: int = Field(20, ge=1, le=10**9, description="steps over which cross-entropies are averaged")


class PrequentialAlpha(_Bounded):
    """Alpha from a bet between teacher and student, settled on label-only probe steps."""

    policy: Literal["prequential"]
    floor: Inside = Field(0.1, description="smallest alpha outside probes; above 0, or it could not recover")
    period: int = Field(50, ge=3, le=10**9, description="steps from one probe to the next")
    probe: int = Field(5, ge=2, description="label-only steps (alpha 0) at the beginning of each period")
    rate: float = Field(5.0, gt=0, le=1e6, description="change of the log-odds per nat and scored step")

    @model_validator(mode="after")
    def _room_to_teach(self) -> PrequentialAlpha:
        if self.probe >= self.period:
            raise ValueError(f"probe ({self.probe}) must be shorter than period ({self.period})")
        return self


Alpha = Annotated[
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
    keep: Inside = Field(0.2, description="fraction of tokens that are taught")


class TeacherEntropyGate(Section):
    """Do not teach the tokens about which the teacher is most certain."""

    kind: Literal["teacher_entropy"]
    drop: Inside = Field(0.15, description="fraction of tokens that are not taught")


class TeacherConfidenceGate(Section):
    """Weigh each token by the teacher's largest probability."""

    kind: Literal["teacher_confidence"]


Gate = Annotated[
    TeacherBetterGate | StudentEntropyGate | TeacherEntropyGate | TeacherConfidenceGate,
    Field(discriminator="kind"),
]


class TopKTruncation(Section):
    """Keep the teacher's k most probable tokens."""

    kind: Literal["top_k"]
    k: int = Field(ge=1, le=1_000_000, description="tokens to keep; at most the vocabulary")


class TopPTruncation(Section):
    """Keep the fewest most probable tokens whose probabilities reach p."""

    kind: Literal["top_p"]
    p: float = Field(gt=0.0, le=1.0, description="teacher mass to keep")


Truncation = Annotated[TopKTruncation | TopPTruncation, Field(discriminator="kind")]


class ObjectiveConfig(Section):
    """(1 - alpha) CE + alpha T^2 D(teacher, student), means over valid tokens (arXiv 2605.23857)."""

    alpha: Alpha = Field(ConstantAlpha(value=0.0), description="a number, or a policy with its settings")
    gate: Gate | None = Field(None, description="factor on alpha per token; default: 1")
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "hard_labels"
    ] = Field("forward_kl", description="D; forward_kl is KL(teacher || student)")
    mixing: Literal["convex", "keep_full_ce", "keep_full_kd"] = Field(
        "convex", description="convex, or CE + alpha D (keep_full_ce), or (1 - alpha) CE + D (keep_full_kd)"
    )
    temperature: Temperature = Field(1.0, description="T, divides both models' logits inside D")
    temperature_squared: bool = Field(True, description="multiply D, value and gradient, by T^2")
    tail: Literal["other_bucket", "renormalise", "none"] = Field(
        "other_bucket", description="teacher mass outside sparse targets: one bucket, spread, or left out"
    )
    truncation: Truncation | None = Field(None, description="truncate the teacher; default: all of it")
    jsd_beta: Inside = Field(0.5, description="weight of the teacher in jsd's mixture")
    skew: Inside = Field(0.1, description="weight of the other model in the skewed divergences' mixture")
    chunk_tokens: int | None = Field(
        None, ge=1, le=2**30, description="tokens per head+loss chunk; default: by V"
    )

    @field_validator("alpha", mode="before")
    @classmethod
    def _number_is_constant(cls, alpha: object) -> object:
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            return {"policy": "constant", "value": alpha}
        return alpha

    @property
    def teaches(self) -> bool:
        """Whether a teacher has any weight at any step."""
        return self.alpha.highest > 0 or self.mixing == "keep_full_kd"

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.mixing == "keep_full_kd" and isinstance(self.alpha, SaltAlpha | PrequentialAlpha):
            raise ValueError(
                f"alpha.policy = {self.alpha.policy} has steps without a teacher, but mixing = keep_full_kd "
                "always teaches; use convex or keep_full_ce"
            )
        if self.tail == "none" and self.divergence not in {"forward_kl", "hard_labels"}:
            raise ValueError(f"tail = none is unbiased for forward_kl only, not for {self.divergence}")
        return self
