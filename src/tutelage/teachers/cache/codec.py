"""What the formats with a few ids per position share, and the one that keeps the largest: `topk`.

A blob is a row of bit-packed columns, described at each codec. Widths in bits: ids ceil(log2 V).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from tutelage.errors import UserError
from tutelage.objective.objective import dense_logits
from tutelage.objective.sparse import TopK, TopP, Truncation, truncate
from tutelage.teachers.cache.packing import (
    LOG_BITS,
    Columns,
    log_codes,
    log_values,
    mass_values,
    pack,
    width_of,
)
from tutelage.types import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.config.teacher_config import TopKFormat
    from tutelage.types import DenseTargets

    Integers = NDArray[np.integer[Any]]

_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20, "mps": 64 * 2**20}
"""Size of the one [rows, V] float32 tensor of logits; a few temporaries of this size stand beside it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a format must know of the cache it is for.

    Attributes:
        vocab_size: token ids of the store; later rows of the teacher's head are padding.
        width: E, the teacher's hidden width.
        temperature: T at which probabilities are kept, above 0. Log p(label) is always that at T=1.
        seed: of samples and of stochastic rounding.
    """

    vocab_size: int
    width: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Teacher hidden states; with the head they are `DenseTargets`.

    Attributes:
        hidden_NE: in the stored dtype (float32 where int8 is stored), a view of the blob where that can be;
            to be brought to the head's dtype before use.
        gold_logp_N: float32 log-probability the teacher gives to the label, at T=1.
    """

    hidden_NE: Tensor
    gold_logp_N: Tensor


Rows = SparseTargets | HiddenRows
"""Decoded targets of consecutive positions, on the CPU."""


class Codec(Protocol):
    """One format with its parameters.

    The same call gives the same bytes in every process. Randomness goes by place and does not depend on
    batches, but a matrix product may: other calls for the same places can differ in a logit's last bit.
    """

    def encode(self, targets: DenseTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
        """One blob per `block` consecutive positions; the last may hold fewer.

        Args:
            targets: of N consecutive positions of the split, on any device.
            labels_N: int64 next-token ids, on the same device.
            first: place of the first of them in the split; sampling depends on it.
            block: positions per blob, at least 1.

        Raises:
            UserError: the teacher's distribution is not finite, or does not fit into the stored dtype.
        """
        ...

    def decode(self, blob: bytes | memoryview, tokens: int) -> Rows:
        """The targets of a blob of `tokens` positions; every blob gives the same number of ids per position.

        A writable buffer may be returned as a view of it, where nothing is to be unpacked.

        Raises:
            ValueError: the blob has another length than `tokens` positions take.
        """
        ...

    def bits_per_token(self) -> float:
        """Size of a position, for planning."""
        ...


def chunks(
    targets: DenseTargets, labels_N: Tensor, first: int, vocab_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits_CV, gold_logp_C) chunk by chunk: float32, at T=1, of the real vocabulary, never [N, V].

    The logits are new memory, free to be overwritten.

    Args:
        targets: of N positions.
        labels_N: next-token ids; one that marks no label is read as id 0.
        first: place of the first position, for the message.
        vocab_size: at most the rows of the head.

    Raises:
        UserError: a distribution is not finite.
        ValueError: the head is smaller than the vocabulary.
    """
    if len(targets.head_VE) < vocab_size:
        raise ValueError(f"head of {len(targets.head_VE)} rows: smaller than the vocabulary of {vocab_size}")
    size = max(1, _CHUNK_BYTES[labels_N.device.type] // (4 * vocab_size))
    for start in range(0, len(labels_N), size):
        rows = slice(start, min(start + size, len(labels_N)))
        logits_CV = dense_logits(targets, rows, vocab_size)
        if logits_CV.device.type == "mps":
            logits_CV = logits_CV.cpu()  # mps has no float64, which the samplers sum in
        label_C1 = labels_N[rows].to(logits_CV.device).clamp(min=0).unsqueeze(1)
        gold_C = logits_CV.gather(1, label_C1).squeeze(1) - logits_CV.logsumexp(-1)
        if not bool(gold_C.isfinite().all()):
            place = first + start + int(gold_C.isfinite().logical_not().nonzero()[0, 0])
            raise UserError(
                f"teacher: its logits at token {place} of the split are not finite; its weights are damaged, "
                "or its dtype overflows (use float32)"
            )
        yield rows, logits_CV, gold_C


class SparseCodec(ABC):
    """Reduces chunks of logits to arrays with one row per position, then packs blocks of rows."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._id_bits = width_of(setting.vocab_size)

    def encode(self, targets: DenseTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
        """See `Codec`."""
        parts = []
        for rows, logits_CV, gold_C in chunks(targets, labels_N, first, self._setting.vocab_size):
            places = np.arange(first + rows.start, first + rows.stop, dtype=np.int64)
            if self._setting.temperature != 1.0:  # a pass over memory
                logits_CV.div_(self._setting.temperature)
            parts.append(self._reduced(logits_CV, gold_C.cpu().numpy(), places))
        arrays = [np.concatenate(chunk) for chunk in zip(*parts, strict=True)]
        starts = range(0, len(labels_N), block)
        return [b"".join(self._columns(*(a[start : start + block] for a in arrays))) for start in starts]

    @abstractmethod
    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        """What is kept of a chunk; `logits_CV` are divided by the temperature, and may be overwritten."""

    @abstractmethod
    def _columns(self, *arrays: Integers) -> list[bytes]:
        """The columns of a block of rows of what `_reduced` returns."""

    def _targets(
        self,
        ids: NDArray[np.int64],
        probs: NDArray[np.float32],
        tail: NDArray[np.float32],
        gold: NDArray[np.float32],
    ) -> SparseTargets:
        of = torch.from_numpy
        return SparseTargets(of(ids), of(probs), of(tail), of(gold), self._setting.temperature)


class TopKCodec(SparseCodec):
    """Columns: (top-p) ids used less 1; ids by falling probability; their log-probabilities; tail; gold.

    Which ids are kept is exactly what online truncation keeps. Log-probabilities, that of the tail and
    that of the label have 16 bits each and are wrong by at most 2^-12 nats. Log-probabilities below
    -31.9995 (p = 1.3e-14) become that; a tail as small becomes 0.
    """

    def __init__(self, config: TopKFormat, setting: Setting) -> None:
        super().__init__(setting)
        self._k = config.k
        self._bounded = config.top_p < 1
        self._truncation: Truncation = TopP(config.top_p, config.k) if self._bounded else TopK(config.k)

    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        del places  # nothing is drawn
        ids_CK, probs_CK, tail_C = truncate(logits_CV.log_softmax(-1), self._truncation)
        missing = 0, self._k - ids_CK.shape[1]  # chunks of a top-p differ in how many ids they need
        ids_CK, probs_CK = F.pad(ids_CK, missing), F.pad(probs_CK, missing)
        logs = log_codes(probs_CK.log().cpu().numpy()), log_codes(tail_C.log().cpu().numpy())
        return ids_CK.cpu().numpy(), *logs, log_codes(gold), (probs_CK > 0).sum(-1).cpu().numpy()

    def _columns(self, *arrays: Integers) -> list[bytes]:
        ids, logs, tail, gold, used = arrays
        counts = []
        if self._bounded:
            kept = np.arange(self._k) < used[:, None]
            ids, logs, counts = ids[kept], logs[kept], [pack(used - 1, width_of(self._k))]
        return [*counts, pack(ids, self._id_bits), *(pack(codes, LOG_BITS) for codes in (logs, tail, gold))]

    def decode(self, blob: bytes | memoryview, tokens: int) -> SparseTargets:
        """See `Codec`; slots that top-p left unused repeat the first id."""
        columns, k = Columns(blob), self._k
        if self._bounded:
            used = columns.take(tokens, width_of(k)).astype(np.int64) + 1
            kept = np.arange(k) < used[:, None]
            entries = int(used.sum())
            ids, probs = np.empty((tokens, k), np.int64), np.zeros((tokens, k), np.float32)
            flat = columns.take(entries, self._id_bits)
            ids[:] = flat[np.cumsum(used) - used, None]
            ids[kept] = flat
            probs[kept] = np.exp(log_values(columns.take(entries, LOG_BITS)))
        else:
            ids = columns.take(tokens * k, self._id_bits).astype(np.int64).reshape(tokens, k)
            probs = np.exp(log_values(columns.take(tokens * k, LOG_BITS))).reshape(tokens, k)
        tail, gold = columns.take(tokens, LOG_BITS), columns.take(tokens, LOG_BITS)
        columns.finish()
        return self._targets(ids, probs, mass_values(tail), log_values(gold))

    def bits_per_token(self) -> float:
        """Exact size of a position; with top-p an upper bound."""
        count = width_of(self._k) if self._bounded else 0
        return float(count + self._k * (self._id_bits + LOG_BITS) + 2 * LOG_BITS)
