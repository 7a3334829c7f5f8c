"""Formats that store an unbiased sample (`sample_multinomial`, `sample_min_variance`) and their samplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from tutelage.data.hashing import uniforms
from tutelage.teachers.cache.codec import SparseCodec, scattered
from tutelage.teachers.cache.packing import (
    GOLD_BITS,
    Columns,
    gold_codes,
    gold_values,
    pack,
    pack_rising,
    square_codes,
    square_values,
    width_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.config.teacher_config import MinVarianceFormat, MultinomialFormat
    from tutelage.teachers.cache.codec import CodecSettings, Integers
    from tutelage.types import SparseTargets

_GROUP = 128
SLACK = 1e-5
"""Relative. Probabilities that reach tau up to this count as heavy. It is far above the error of float32
sums, so that no id spans two points of a systematic sample."""


@dataclass(frozen=True, slots=True)
class MinVarianceSample:
    """K different ids per position: heavy ones with their probabilities, light ones that share one mass.

    Attributes:
        ids_NK: int64; the heavy ones first, by falling probability, then the sampled ones by rising id.
        heavy_N: int64, how many are heavy, 0 to K.
        probs_NK: float64 probabilities of the heavy ids; other slots are undefined.
        light_N: float64, mass of all ids that are not heavy; each sampled id weighs light / (K - heavy).
    """

    ids_NK: Tensor
    heavy_N: Tensor
    probs_NK: Tensor
    light_N: Tensor


def min_variance(logits_NV: Tensor, k: int, uniform_N: Tensor) -> MinVarianceSample:
    """Sample exactly k ids per position, unbiased, with the least summed variance that k weights can have.

    Ids of probability tau and above are kept with their probability. The others are sampled with
    inclusion probability p / tau and weigh tau, which is chosen such that their number is k minus the
    heavy ones. One uniform number places the points of a systematic sample: light ids lie side by side
    on a line of length k - heavy, each as long as its inclusion probability, and a point falls into
    every unit of it. (Threshold sampling: Duffield, Lund and Thorup, 2007; the systematic form: Madow, 1949.)

    If fewer than k ids have a probability above 0, all are heavy, with others of probability 0.

    Args:
        logits_NV: float32, divided by the temperature; may be overwritten.
        k: at least 1, at most V.
        uniform_N: float64 in (0, 1), on any device.
    """
    logits_NGS = _grouped(logits_NV)
    top_NK = _largest(logits_NGS, k)  # of logits, which tell ids of probability 0 from those that fill up
    mass_NGS = _softmax(logits_NGS)
    mass_NV = mass_NGS.flatten(1)
    kept_NK = mass_NV.gather(1, top_NK)
    mass_NV.scatter_(1, top_NK, 0.0)
    outside_N1 = mass_NGS.sum(-1).double().sum(-1, keepdim=True)
    # Mass from slot j on, summed from its end: 1 minus the rest would lose what a sharp teacher leaves.
    left_NK = kept_NK.double().flip(-1).cumsum(-1).flip(-1) + outside_N1
    slots_K = torch.arange(k, device=logits_NV.device)
    slack_K = torch.where(slots_K < k - 1, SLACK, 0.0)  # a last slot without slack: what is outside stays in
    heavy_NK = kept_NK * (k - slots_K) >= left_NK * (1 - slack_K)
    heavy_NK = heavy_NK.cumprod(-1).bool()
    heavy_N1 = heavy_NK.sum(-1, keepdim=True)
    mass_NV.scatter_(1, top_NK, kept_NK.masked_fill(heavy_NK, 0.0))
    point_NK = slots_K - heavy_N1 + uniform_N.to(logits_NV.device).unsqueeze(1)
    fraction_NK = (point_NK / (k - heavy_N1).clamp(min=1)).masked_fill(heavy_NK, 0.0)
    light_NK = _locate(mass_NGS, fraction_NK)
    left_NJ = torch.cat([left_NK, outside_N1], 1)
    return MinVarianceSample(
        torch.where(heavy_NK, top_NK, light_NK),
        heavy_N1.squeeze(1),
        kept_NK.double() / left_NK[:, :1],
        (left_NJ.gather(1, heavy_N1) / left_NK[:, :1]).squeeze(1),
    )


def multinomial(logits_NV: Tensor, uniform_NJ: Tensor) -> Tensor:
    """Draw one id per uniform number from softmax(logits), with replacement: int64 [N, J], by rising id.

    Args:
        logits_NV: float32, divided by the temperature; may be overwritten.
        uniform_NJ: float64 in (0, 1), on any device.
    """
    return _locate(_softmax(_grouped(logits_NV)), uniform_NJ.to(logits_NV.device).sort(-1).values)


def _grouped(logits_NV: Tensor) -> Tensor:
    """[N, G, S]: the vocabulary in groups; the last is filled up with ids of probability 0."""
    if missing := -logits_NV.shape[1] % _GROUP:
        logits_NV = F.pad(logits_NV, (0, missing), value=-torch.inf)
    return logits_NV.view(len(logits_NV), -1, _GROUP)


def _softmax(logits_NGS: Tensor) -> Tensor:
    """Probabilities in the place of the logits."""
    flat_NV = logits_NGS.view(len(logits_NGS), -1)
    torch.softmax(flat_NV, -1, out=flat_NV)
    return logits_NGS


def _largest(logits_NGS: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, by falling logit; they lie in the k groups of largest maximum."""
    groups, size = logits_NGS.shape[1:]
    if k >= groups:
        return logits_NGS.flatten(1).topk(k, dim=-1).indices
    group_NK = logits_NGS.amax(-1).topk(k, dim=-1).indices
    candidates_NKS = logits_NGS.gather(1, group_NK.unsqueeze(2).expand(-1, -1, size))
    place_NK = candidates_NKS.flatten(1).topk(k, dim=-1).indices
    return group_NK.gather(1, place_NK // size) * size + place_NK % size


def _locate(mass_NGS: Tensor, fraction_NJ: Tensor) -> Tensor:
    """The ids at which the running sum of the mass passes the given fractions of the whole.

    An id without mass is found only if no id has any.
    """
    groups, size = mass_NGS.shape[1:]
    if fraction_NJ.shape[1] >= groups:
        return _passed(mass_NGS.flatten(1), fraction_NJ)[0]
    group_NJ, inside_NJ = _passed(mass_NGS.sum(-1), fraction_NJ)
    mass_MS = mass_NGS.gather(1, group_NJ.unsqueeze(2).expand(-1, -1, size)).flatten(0, 1)
    place_M1, _ = _passed(mass_MS, inside_NJ.reshape(-1, 1))
    return group_NJ * size + place_M1.view_as(group_NJ)


def _passed(mass_NM: Tensor, fraction_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """(entries at which the running sum passes fractions of the whole, the fraction inside each entry)."""
    running_NM = mass_NM.double().cumsum(-1)
    whole_N1 = running_NM[:, -1:].contiguous()
    point_NJ = fraction_NJ * whole_N1
    # Rounding may lift a point to the whole; the last entry with mass is where the whole is reached.
    last_N1 = torch.searchsorted(running_NM, whole_N1)
    index_NJ = torch.minimum(torch.searchsorted(running_NM, point_NJ, right=True), last_N1)
    entry_NJ = mass_NM.gather(1, index_NJ).double()
    start_NJ = running_NM.gather(1, index_NJ) - entry_NJ
    inside_NJ = (point_NJ - start_NJ) / entry_NJ.clamp(min=torch.finfo(torch.float64).tiny)
    return index_NJ, inside_NJ.clamp(0.0, 1.0)


_SAMPLE, _GOLD, _VALUES, _LIGHT = range(4)
"""Streams of random numbers; draws must not depend on rounding."""

_DIFFERENT, _HEAVY = 0.76, 0.3
"""N draws give N^0.76 different ids, and three in ten ids are heavy: measured on English with a teacher of
135M parameters, for estimates of size."""


class _SampleCodec(SparseCodec):
    def _uniform(self, stream: int, places: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
        return uniforms(self._settings.seed, stream, places, draws)

    def _gold(self, gold: NDArray[np.float32], places: NDArray[np.int64]) -> NDArray[np.uint32]:
        return gold_codes(gold, self._uniform(_GOLD, places, 1)[:, 0])


class MultinomialCodec(_SampleCodec):
    """Columns: number of different ids minus 1; ids; how often each was drawn minus 1; log p(label).

    The weight of an id is its share of the draws: stored exactly, and its mean is the probability. Log
    p(label) is unbiased and wrong by at most 0.012 sqrt(its size) nats.
    """

    def __init__(self, config: MultinomialFormat, settings: CodecSettings) -> None:
        super().__init__(settings)
        self._draws = config.draws
        self._slots = min(config.draws, settings.vocab_size)

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
        entries = int(used.sum())
        ids, is_used = scattered(used, columns.take(entries, self._id_bits), self._slots)
        probs = np.zeros(ids.shape, np.float32)
        counts = columns.take(entries, width_of(self._draws)) + np.uint32(1)
        probs[is_used] = counts / np.float32(self._draws)
        gold = gold_values(columns.take(tokens, GOLD_BITS))
        columns.finish()
        return self._targets(ids, probs, np.zeros(tokens, np.float32), gold)

    def bits_per_token(self) -> float:
        """An estimate: 19.6 different ids of 50 draws; larger teachers (12.1, arXiv 2503.16870) take less."""
        entries: float = min(self._draws**_DIFFERENT, self._slots)
        return width_of(self._slots) + entries * (self._id_bits + width_of(self._draws)) + GOLD_BITS


class MinVarianceCodec(_SampleCodec):
    """Columns: number of heavy ids; these by rank; light ids; heavy probabilities; light mass; log p(label).

    Weights are unbiased and their sum is 1. The largest is not stored: it is 1 minus the others. The others,
    and the mass of all light ids together, are rounded at random to the grid (code / M)^2. Where no id is
    heavy all weights are 1 / K, and where all are, there is no light mass: nothing is stored then.

    The largest weight cannot fall below 0. If an id is heavy, the largest probability p is at least
    1 / K. Rounding lifts x by less than 2 sqrt(x) / M + 1 / M^2, and at most K - 1 numbers of sum
    1 - p are rounded, so that (Cauchy and Schwarz) they gain less than
    2 sqrt((K - 1) (1 - p)) / M + (K - 1) / M^2. `safe_bits` makes that less than p at p = 1 / K; for a
    larger p the gain is smaller still.
    """

    def __init__(self, config: MinVarianceFormat, settings: CodecSettings) -> None:
        super().__init__(settings)
        self._k = config.ids
        self._bits = safe_bits(config.ids)
        self._levels = 2**self._bits - 1
        low_bits = max(1, self._id_bits - self._k.bit_length() + 1)
        self._rising = low_bits, ((settings.vocab_size - 1) >> low_bits) + 1

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
        """An estimate: three in ten ids heavy."""
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
