"""Settings of the optimizer and of the learning rate's three parts: warm-up, what follows it, decay.

The rate itself is in `tutelage.train.step`. This module imports no torch, so that a config is read for free.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tutelage.config.base import Fraction, Section, parse_tokens, tokens_text


def _fraction_or_tokens(warmup: object) -> object:
    """A fraction stays a number; tokens become the one text that is hashed, such as "40K"."""
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


Warmup = Annotated[Fraction | str, BeforeValidator(_fraction_or_tokens, json_schema_input_type=float | str)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="peak learning rate; default: the shape's tuned one, 1e-5 in stage sft",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW beta1, beta2")
    eps: float = Field(1e-8, ge=1e-30, le=1, description="AdamW epsilon")
    weight_decay: float = Field(0.1, ge=0, le=1e3, description="on matrices only, not on norms and biases")
    clip: float = Field(1.0, ge=1e-30, le=1e30, description="largest global gradient norm")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: Warmup = Field(
        0.05,
        description="linear warm-up: fraction of the steps, or tokens ('2M'); default in stage sft: 0.01",
    )
    decay: Fraction = Field(0.2, description="fraction of steps of linear decay at the end (wsd only)")
    final_lr: Fraction = Field(0.1, description="learning rate at the last step, as a fraction of the peak")

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
        return math.ceil(self.warmup * steps)

    def decay_steps(self, steps: int) -> int:
        """Steps of linear decay at the end of a wsd run of `steps`."""
        return max(1, round(self.decay * steps)) if self.decay else 0

    def decay_start(self, steps: int, batch_tokens: int) -> int:
        """The first step of the linear decay of a wsd run; `steps` if there is none."""
        return max(self.warmup_steps(steps, batch_tokens), steps - self.decay_steps(steps))

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
