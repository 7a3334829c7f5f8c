"""What a teacher cache keeps of each distribution. Settings only, so that a config can be read for free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tutelage.settings import Section


class TopKFormat(Section):
    """The k most probable ids with their log-probabilities, and the mass of the rest."""

    kind: Literal["topk"]
    k: int = Field(ge=1, description="ids per position")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="stop earlier once the kept mass reaches this")


class MultinomialFormat(Section):
    """Draws with replacement, as ids and counts: random-sampling KD (arXiv 2503.16870)."""

    kind: Literal["sample_multinomial"]
    draws: int = Field(50, ge=1, le=4095, description="draws per position")


class MinVarianceFormat(Section):
    """Large probabilities exactly, small ones sampled at one common value, with least variance."""

    kind: Literal["sample_min_variance"] = "sample_min_variance"
    ids: int = Field(16, ge=1, le=1000, description="ids per position")


class HiddenFormat(Section):
    """The teacher's last hidden states, with its head stored once: dense targets without its forward."""

    kind: Literal["hidden"]
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float16", description="of the stored states; int8 has one scale per position"
    )


Format = Annotated[
    TopKFormat | MultinomialFormat | MinVarianceFormat | HiddenFormat, Field(discriminator="kind")
]
