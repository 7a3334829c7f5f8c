"""The registry of formats of a teacher cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tutelage.config.teacher_config import MinVarianceFormat, TopKFormat
from tutelage.errors import UserError
from tutelage.teachers.cache.codec import Codec, HiddenRows, Rows, Setting, TopKCodec, chunks
from tutelage.teachers.cache.packing import LARGEST_WIDTH
from tutelage.teachers.cache.sampled import MinVarianceCodec, MultinomialCodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tutelage.config.teacher_config import Format, HiddenFormat
    from tutelage.types import DenseTargets

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_INT8_LEVELS = 127


@dataclass(frozen=True, slots=True)
class HiddenCodec:
    """Columns: states, then (int8) the scale of each position as float32, then log p(label) as float32.

    float32 is exact. float16 and bfloat16 round to nearest, with a relative error of at most 2^-11 and
    2^-8 per entry (float16: for entries above 6e-5). An int8 entry is wrong by at most 1/254 (0.4%)
    of the largest entry of its position.
    """

    config: HiddenFormat
    setting: Setting

    def encode(self, targets: DenseTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
        """See `Codec`; float16 raises UserError where a state is above 65,504."""
        if targets.hidden_NE.shape[1] != self.setting.width:
            raise ValueError(f"states of width {targets.hidden_NE.shape[1]}: must be {self.setting.width}")
        gold = [gold_C for _, _, gold_C in chunks(targets, labels_N, first, self.setting.vocab_size)]
        columns = [column.cpu() for column in (*self._stored(targets.hidden_NE, first), torch.cat(gold))]
        return [
            b"".join(_bytes(column[start : start + block]) for column in columns)
            for start in range(0, len(labels_N), block)
        ]

    def _stored(self, hidden_NE: Tensor, first: int) -> list[Tensor]:
        """States in the stored dtype, and of int8 the scale per position."""
        if self.config.dtype == "int8":
            scale_N1 = hidden_NE.float().abs().amax(-1, keepdim=True) / _INT8_LEVELS
            states_NE = hidden_NE.float() / scale_N1.masked_fill(scale_N1 == 0, 1.0)
            return [states_NE.round().to(torch.int8), scale_N1.squeeze(1)]
        states_NE = hidden_NE.to(_DTYPES[self.config.dtype])
        finite_N = states_NE.isfinite().all(-1)
        if not bool(finite_N.all()):
            place = first + int(finite_N.logical_not().nonzero()[0, 0])
            raise UserError(
                f"format.dtype {self.config.dtype}: the hidden state of token {place} of the split does not "
                "fit into it; choose bfloat16"
            )
        return [states_NE]

    def decode(self, blob: bytes | memoryview, tokens: int) -> HiddenRows:
        """See `Codec`."""
        if len(blob) * 8 != tokens * self.bits_per_token():
            raise ValueError(f"{len(blob)} bytes: {tokens} positions take {self.bits_per_token() / 8:g} each")
        raw = np.frombuffer(blob, np.uint8)
        if not raw.flags.writeable:
            raw = raw.copy()  # torch has no read-only tensors
        whole = torch.from_numpy(raw)
        dtype = _DTYPES[self.config.dtype]
        split = tokens * self.setting.width * dtype.itemsize
        states_NE = _viewed(whole[:split], dtype).view(tokens, self.setting.width)
        numbers_N = _viewed(whole[split:], torch.float32)
        if dtype == torch.int8:
            states_NE = states_NE.float() * numbers_N[:tokens].unsqueeze(1)
        return HiddenRows(states_NE, numbers_N[-tokens:])

    def bits_per_token(self) -> float:
        """Exact size of a position."""
        quantised = self.config.dtype == "int8"
        return 8.0 * (self.setting.width * _DTYPES[self.config.dtype].itemsize + (8 if quantised else 4))


def _bytes(column: Tensor) -> bytes:
    raw: bytes = column.contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def _viewed(bytes_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; copied only if they do not begin where such a number may."""
    if bytes_N.data_ptr() % dtype.itemsize or bytes_N.storage_offset() % dtype.itemsize:
        bytes_N = bytes_N.clone()
    return bytes_N.view(dtype)


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
