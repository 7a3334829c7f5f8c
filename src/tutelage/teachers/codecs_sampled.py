"""The formats that keep an unbiased sample: `sample_multinomial` and `sample_min_variance`.

A blob is a row of bit-packed columns, described at each codec. Widths in bits: ids ceil(log2 V), log p(label)
10, counts as they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tutelage.data.hashing import uniforms
from tutelage.teachers.bits import Columns, pack, pack_rising, width_of
from tutelage.teachers.codecs_sparse import SparseCodec
from tutelage.teachers.grids import GOLD_BITS, gold_codes, gold_values, square_codes, square_values
from tutelage.teachers.sparsify import SLACK, min_variance, multinomial

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.cacheformats import MinVarianceFormat, MultinomialFormat
    from tutelage.teachers.codec import Setting
    from tutelage.types import SparseTargets

    Integers = NDArray[np.integer[Any]]

_SAMPLE, _GOLD, _VALUES, _LIGHT = range(4)
"""Streams of random numbers; what is drawn must not depend on how it is rounded."""


_DIFFERENT, _HEAVY = 0.76, 0.3
"""What real distributions are like, for estimates of size."""


class _SampleCodec(SparseCodec):
    def _uniform(self, stream: int, places: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
        return uniforms(self._setting.seed, stream, places, draws)

    def _gold(self, gold: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.uint32]:
        return gold_codes(gold, self._uniform(_GOLD, places, 1)[:, 0])


class MultinomialCodec(_SampleCodec):
    """Columns: number of different ids less 1; ids; how often each was drawn less 1; gold.

    The weight of an id is the share of draws that gave it: exact, and its mean is the probability. Log
    p(label) is right on average; one is wrong by at most 0.012 sqrt(its size) nats.
    """

    def __init__(self, config: MultinomialFormat, setting: Setting) -> None:
        super().__init__(setting)
        self._draws = config.draws
        self._slots = min(config.draws, setting.vocab_size)

    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        uniform = torch.from_numpy(self._uniform(_SAMPLE, places, self._draws))
        return multinomial(logits_CV, uniform).int().cpu().numpy(), self._gold(gold, places)

    def _columns(self, *arrays: Integers) -> list[bytes]:
        drawn, gold = arrays
        new = np.ones(drawn.shape, np.bool_)  # where a run of equal ids begins; they are sorted
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        counts = np.diff(np.flatnonzero(new), append=new.size)
        return [
            pack(new.sum(-1) - 1, width_of(self._slots)),
            pack(drawn[new], self._id_bits),
            pack(counts - 1, width_of(self._draws)),
            pack(gold, GOLD_BITS),
        ]

    def decode(self, blob: bytes | memoryview, tokens: int) -> SparseTargets:
        """See `Codec`; as many slots as there can be different ids."""
        columns = Columns(blob)
        used = columns.take(tokens, width_of(self._slots)).astype(np.int64) + 1
        entries, kept = int(used.sum()), np.arange(self._slots) < used[:, None]
        ids, probs = np.empty(kept.shape, np.int64), np.zeros(kept.shape, np.float32)
        flat = columns.take(entries, self._id_bits)
        ids[:] = flat[np.cumsum(used) - used, None]
        ids[kept] = flat
        probs[kept] = (columns.take(entries, width_of(self._draws)) + np.uint32(1)) / np.float32(self._draws)
        gold = gold_values(columns.take(tokens, GOLD_BITS))
        columns.finish()
        return self._targets(ids, probs, np.zeros(tokens, np.float32), gold)

    def bits_per_token(self) -> float:
        """An estimate: N^0.76 different ids among N draws, as a teacher of 135M parameters gives on English.

        That is 19.6 of 50; larger teachers are surer (arXiv 2503.16870: 12.1) and take less.
        """
        entries: float = min(self._draws**_DIFFERENT, self._slots)
        return width_of(self._slots) + entries * (self._id_bits + width_of(self._draws)) + GOLD_BITS


class MinVarianceCodec(_SampleCodec):
    """Columns: number of heavy ids; these by rank; the light ids; heavy probabilities; light mass; gold.

    Weights are right on average and their sum is 1. The largest is not stored: it is 1 less the others. The
    others, and the mass of all light ids together, are rounded by chance to the grid (code / M)^2. Where no
    id is heavy all weights are 1 / K, and where all are, there is no light mass: nothing is stored then.

    The largest weight cannot fall below 0. If an id is heavy, the largest probability p is at least
    1 / K. Rounding lifts x by less than 2 sqrt(x) / M + 1 / M^2, and at most K - 1 numbers of sum
    1 - p are rounded, so that (Cauchy and Schwarz) they gain less than
    2 sqrt((K - 1) (1 - p)) / M + (K - 1) / M^2. `safe_bits` makes that less than p at p = 1 / K; for a
    larger p the gain is smaller still.
    """

    def __init__(self, config: MinVarianceFormat, setting: Setting) -> None:
        super().__init__(setting)
        self._k = config.ids
        self._bits = safe_bits(config.ids)
        self._levels = 2**self._bits - 1
        low_bits = max(1, self._id_bits - self._k.bit_length() + 1)
        self._rising = low_bits, ((setting.vocab_size - 1) >> low_bits) + 1

    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        kept = min_variance(logits_CV, self._k, torch.from_numpy(self._uniform(_SAMPLE, places, 1)[:, 0]))
        probs, light = kept.probs_NK.cpu().numpy(), kept.light_N.cpu().numpy()
        values = square_codes(probs, self._levels, self._uniform(_VALUES, places, self._k))
        shared = square_codes(light, self._levels, self._uniform(_LIGHT, places, 1)[:, 0])
        ids, heavy = kept.ids_NK.int().cpu().numpy(), kept.heavy_N.cpu().numpy()
        return heavy, ids, values, shared, self._gold(gold, places)

    def _columns(self, *arrays: Integers) -> list[bytes]:
        heavy, ids, values, shared, gold = arrays
        used = np.arange(self._k) < heavy[:, None]
        rest = used & (np.arange(self._k) > 0)
        return [
            pack(heavy, width_of(self._k + 1)),
            pack(ids[used], self._id_bits),
            pack_rising(ids[~used], self._k - heavy, *self._rising),
            pack(values[rest], self._bits),
            pack(shared[(heavy > 0) & (heavy < self._k)], self._bits),
            pack(gold, GOLD_BITS),
        ]

    def decode(self, blob: bytes | memoryview, tokens: int) -> SparseTargets:
        """See `Codec`; an id whose weight was rounded to 0 stays, with probability 0."""
        columns, k = Columns(blob), self._k
        heavy = columns.take(tokens, width_of(k + 1)).astype(np.int64)
        used = np.arange(k) < heavy[:, None]
        ids = np.empty((tokens, k), np.int64)
        ids[used] = columns.take(int(heavy.sum()), self._id_bits)
        ids[~used] = columns.take_rising(k - heavy, *self._rising)
        some, mixed = heavy > 0, (heavy > 0) & (heavy < k)
        codes = columns.take(int(heavy.sum()) - int(some.sum()), self._bits)
        shared = np.ones(tokens, np.float32)
        shared[mixed] = square_values(columns.take(int(mixed.sum()), self._bits), self._levels)
        shared /= np.maximum(k - heavy, 1)
        probs = np.repeat(shared, k).reshape(tokens, k)
        probs[:, 1:][used[:, 1:]] = square_values(codes, self._levels)
        probs[:, 0] = 0
        probs[:, 0] = 1 - np.einsum("nk->n", probs)  # row by row the same, whatever the block
        gold = gold_values(columns.take(tokens, GOLD_BITS))
        columns.finish()
        return self._targets(ids, probs, np.zeros(tokens, np.float32), gold)

    def bits_per_token(self) -> float:
        """An estimate: three in ten ids heavy, as a teacher of 135M parameters gives on English."""
        heavy = round(_HEAVY * self._k)
        low_bits, groups = self._rising
        ids = heavy * self._id_bits + (self._k - heavy) * (low_bits + 1) + groups - 1
        return float(width_of(self._k + 1) + ids + max(1, heavy) * self._bits + GOLD_BITS)


def safe_bits(k: int) -> int:
    """Bits per value that leave the largest of k weights above 0; see `MinVarianceCodec`."""
    bits = 1
    while True:
        levels = 2**bits - 1
        if 2 * (k - 1) / (k**0.5 * levels) + (k - 1) / levels**2 < (1 - 10 * SLACK) / k:
            return bits
        bits += 1
