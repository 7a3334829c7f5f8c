"""The registry of formats of a teacher cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.cacheformats import MinVarianceFormat, TopKFormat
from tutelage.errors import UserError
from tutelage.teachers.bits import LARGEST_WIDTH
from tutelage.teachers.codec import Codec, HiddenRows, Rows, Setting
from tutelage.teachers.codecs_hidden import HiddenCodec
from tutelage.teachers.codecs_sampled import MinVarianceCodec, MultinomialCodec
from tutelage.teachers.codecs_sparse import TopKCodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.cacheformats import Format

__all__ = ["FORMATS", "Codec", "HiddenRows", "Kind", "Rows", "Setting", "make_codec"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A format.

    Attributes:
        summary: what is kept.
        exactness: what is lost, with the bound on each error.
        make: a codec from the format's config and the cache's setting.
    """

    summary: str
    exactness: str
    make: Callable[[Any, Setting], Codec]


FORMATS: dict[str, Kind] = {
    "topk": Kind(
        "the k most probable ids, their log-probabilities and the mass of the rest",
        "biased by the cut; the same ids as online truncation, log-probabilities within 2^-12 nats",
        TopKCodec,
    ),
    "sample_multinomial": Kind(
        "N draws with replacement, as ids and counts (arXiv 2503.16870)",
        "unbiased; weights exact; log p(label) unbiased, within 0.012 sqrt(its size) nats",
        MultinomialCodec,
    ),
    "sample_min_variance": Kind(
        "K ids: large probabilities kept, small ones sampled at one common weight",
        "unbiased, with the least variance for K weights; stored weights rounded by chance to a square grid, "
        "right on average, their sum 1; log p(label) unbiased, within 0.012 sqrt(its size) nats",
        MinVarianceCodec,
    ),
    "hidden": Kind(
        "the teacher's last hidden states, beside its head: dense targets at any temperature",
        "float32 exact; float16 within 2^-11, bfloat16 within 2^-8 of an entry; int8 within 1/254 of the "
        "largest entry of the position",
        HiddenCodec,
    ),
}
"""Formats by the name users write."""


def make_codec(config: Format, setting: Setting) -> Codec:
    """The codec of a format.

    Raises:
        UserError: it keeps more ids than there are, or the vocabulary is too large to pack.
    """
    if setting.vocab_size > 2**LARGEST_WIDTH:
        raise UserError(
            f"vocabulary of {setting.vocab_size}: caches hold ids of at most {LARGEST_WIDTH} bits, "
            f"{2**LARGEST_WIDTH} of them"
        )
    for field, kept in _kept(config):
        if kept > setting.vocab_size:
            raise UserError(f"format.{field} {kept}: must be at most the vocabulary of {setting.vocab_size}")
    return FORMATS[config.kind].make(config, setting)


def _kept(config: Format) -> list[tuple[str, int]]:
    """The field that says how many ids are kept, where that may not exceed the vocabulary."""
    if isinstance(config, TopKFormat):
        return [("k", config.k)]
    return [("ids", config.ids)] if isinstance(config, MinVarianceFormat) else []
