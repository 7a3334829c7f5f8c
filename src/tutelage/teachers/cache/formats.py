"""The registry of formats of a teacher cache, and the formats that draw nothing: `topk` and `hidden`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from tutelage.config.teacher_config import MinVarianceFormat, TopKFormat
from tutelage.errors import UserError
from tutelage.objective.sparse import truncate
from tutelage.teachers.cache.codec import (
    Codec,
    CodecSettings,
    HiddenRows,
    SparseCodec,
    logit_chunks,
    scattered,
)
from tutelage.teachers.cache.packing import (
    LARGEST_WIDTH,
    LOG_BITS,
    Columns,
    log_codes,
    log_values,
    pack,
    width_of,
)
from tutelage.teachers.cache.sampled import MinVarianceCodec, MultinomialCodec
from tutelage.types import DenseTargets

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.config.teacher_config import Format, HiddenFormat
    from tutelage.teachers.cache.codec import Integers
    from tutelage.types import SparseTargets, WholeTargets


class TopKCodec(SparseCodec):
    """Columns: (top-p) ids used minus 1; ids by falling probability; their log-probabilities; tail; gold.

    The stored ids are exactly those of online truncation. Log-probabilities, that of the tail and that of the
    label have 16 bits each and are wrong by at most 2^-12 nats. Log-probabilities below -31.9995
    (p = 1.3e-14) become that, also of a tail: none where there is one would make reverse KL infinite.
    """

    def __init__(self, config: TopKFormat, settings: CodecSettings) -> None:
        super().__init__(settings)
        self._k, self._top_p = config.k, config.top_p
        self._bounded = config.top_p < 1

    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        del places  # nothing is drawn
        ids_CK, probs_CK, tail_C = truncate(logits_CV.log_softmax(-1), self._k, self._top_p)
        missing = 0, self._k - ids_CK.shape[1]  # chunks of a top-p differ in how many ids they need
        ids_CK, probs_CK = F.pad(ids_CK, missing), F.pad(probs_CK, missing)
        logs = log_codes(probs_CK.log().cpu().numpy()), log_codes(tail_C.log().cpu().numpy())
        return ids_CK.cpu().numpy(), *logs, log_codes(gold), (probs_CK > 0).sum(-1).cpu().numpy()

    def _columns(self, *arrays: Integers) -> list[bytes]:
        ids, logs, tail, gold, used = arrays
        counts = []
        if self._bounded:
            is_used = np.arange(self._k) < used[:, None]
            ids, logs, counts = ids[is_used], logs[is_used], [pack(used - 1, width_of(self._k))]
        return [*counts, pack(ids, self._id_bits), *(pack(codes, LOG_BITS) for codes in (logs, tail, gold))]

    def decode(self, blob: bytes | memoryview, tokens: int) -> SparseTargets:
        """See `Codec`; slots that top-p left unused repeat the first id."""
        columns, k = Columns(blob), self._k
        if self._bounded:
            used = columns.take(tokens, width_of(k)).astype(np.int64) + 1
            entries = int(used.sum())
            ids, is_used = scattered(used, columns.take(entries, self._id_bits), k)
            probs = np.zeros((tokens, k), np.float32)
            probs[is_used] = np.exp(log_values(columns.take(entries, LOG_BITS)))
        else:
            ids = columns.take(tokens * k, self._id_bits).astype(np.int64).reshape(tokens, k)
            probs = np.exp(log_values(columns.take(tokens * k, LOG_BITS))).reshape(tokens, k)
        tail, gold = (log_values(columns.take(tokens, LOG_BITS)) for _ in range(2))
        columns.finish()
        is_whole = k == self._settings.vocab_size and not self._bounded
        return self._targets(ids, probs, np.exp(tail) * np.float32(not is_whole), gold)

    def bits_per_token(self) -> float:
        """Exact size of a position; with top-p an upper bound."""
        count = width_of(self._k) if self._bounded else 0
        return float(count + self._k * (self._id_bits + LOG_BITS) + 2 * LOG_BITS)


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
    settings: CodecSettings

    def encode(self, targets: WholeTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
        """See `Codec`; float16 raises UserError where a state is above 65,504."""
        assert isinstance(targets, DenseTargets)  # noqa: S101 - a mean has no states, its config is refused
        if targets.hidden_NE.shape[1] != self.settings.width:
            raise ValueError(f"states of width {targets.hidden_NE.shape[1]}: must be {self.settings.width}")
        vocab_size = self.settings.vocab_size
        gold = [gold_C for _, _, gold_C in logit_chunks(targets, labels_N, first, vocab_size)]
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
        split = tokens * self.settings.width * dtype.itemsize
        states_NE = _viewed(whole[:split], dtype).view(tokens, self.settings.width)
        numbers_N = _viewed(whole[split:], torch.float32)
        if dtype == torch.int8:
            states_NE = states_NE.float() * numbers_N[:tokens].unsqueeze(1)
        return HiddenRows(states_NE, numbers_N[-tokens:])

    def bits_per_token(self) -> float:
        """Exact size of a position."""
        quantised = self.config.dtype == "int8"
        return 8.0 * (self.settings.width * _DTYPES[self.config.dtype].itemsize + (8 if quantised else 4))


def _bytes(column: Tensor) -> bytes:
    raw: bytes = column.contiguous().view(torch.uint8).numpy().tobytes()
    return raw


def _viewed(bytes_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; copied only if they do not begin where such a number may."""
    if bytes_N.data_ptr() % dtype.itemsize or bytes_N.storage_offset() % dtype.itemsize:
        bytes_N = bytes_N.clone()
    return bytes_N.view(dtype)


@dataclass(frozen=True, slots=True)
class FormatKind:
    """A kind of format.

    Attributes:
        summary: what is stored.
        exactness: what is lost, with the bound on each error.
        make: a codec from the format's config and the cache's properties.
    """

    summary: str
    exactness: str
    make: Callable[[Any, CodecSettings], Codec]


FORMATS: dict[str, FormatKind] = {
    "topk": FormatKind(
        "the k most probable ids, their log-probabilities and the mass of the rest",
        "biased by the cut; the same ids as online truncation, log-probabilities within 2^-12 nats",
        TopKCodec,
    ),
    "sample_multinomial": FormatKind(
        "N draws with replacement, as ids and counts (arXiv 2503.16870)",
        "unbiased; weights exact; log p(label) unbiased, within 0.012 sqrt(its size) nats",
        MultinomialCodec,
    ),
    "sample_min_variance": FormatKind(
        "K ids: large probabilities kept, small ones sampled at one common weight",
        "unbiased, with the least variance for K weights; stored weights rounded by chance to a square grid, "
        "right on average, their sum 1; log p(label) unbiased, within 0.012 sqrt(its size) nats",
        MinVarianceCodec,
    ),
    "hidden": FormatKind(
        "the teacher's last hidden states, beside its head: dense targets at any temperature",
        "float32 exact; float16 within 2^-11, bfloat16 within 2^-8 of an entry; int8 within 1/254 of the "
        "largest entry of the position",
        HiddenCodec,
    ),
}
"""Formats by the name users write."""


def make_codec(config: Format, settings: CodecSettings) -> Codec:
    """The codec of a format.

    Raises:
        UserError: it keeps more ids than there are, or the vocabulary is too large to pack.
    """
    vocab_size = settings.vocab_size
    if vocab_size > 2**LARGEST_WIDTH:
        raise UserError(
            f"vocabulary of {vocab_size}: caches hold ids of at most {LARGEST_WIDTH} bits, "
            f"{2**LARGEST_WIDTH} of them"
        )
    match config:
        case TopKFormat(k=ids) if ids > vocab_size:
            raise UserError(f"format.k {ids}: must be at most the vocabulary of {vocab_size}")
        case MinVarianceFormat(ids=ids) if ids > vocab_size:
            raise UserError(f"format.ids {ids}: must be at most the vocabulary of {vocab_size}")
    return FORMATS[config.kind].make(config, settings)
