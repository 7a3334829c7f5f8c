"""Protocol of the codecs, the rows they decode to, and the base of those that keep a few ids a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tutelage.errors import UserError
from tutelage.objective.products import dense_logits
from tutelage.teachers.cache.packing import width_of
from tutelage.types import SparseTargets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from tutelage.teachers.cache.layout import CacheManifest
    from tutelage.types import Rows as TokenRows
    from tutelage.types import WholeTargets

    Integers = NDArray[np.integer[Any]]

_CHUNK_BYTES = {"cpu": 32 * 2**20, "mps": 64 * 2**20}
_ACCELERATOR_BYTES = 256 * 2**20
"""Size of the one [rows, V] float32 tensor of logits; a few temporaries of this size stand beside it."""


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """Properties of a cache that its codec needs.

    Attributes:
        vocab_size: token ids of the store; later rows of the teacher's head are padding.
        width: E, the teacher's hidden width.
        temperature: T of the stored probabilities, above 0. Log p(label) is always that at T=1.
        seed: of samples and of stochastic rounding.
    """

    vocab_size: int
    width: int
    temperature: float
    seed: int

    @staticmethod
    def of(manifest: CacheManifest) -> CodecSettings:
        """The properties of the cache that a manifest describes."""
        return CodecSettings(manifest.vocab_size, manifest.width, manifest.temperature, manifest.seed)


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

    def rows(self, rows: TokenRows) -> HiddenRows:
        """The states of some tokens."""
        return HiddenRows(self.hidden_NE[rows], self.gold_logp_N[rows])

    @staticmethod
    def cat(parts: Sequence[HiddenRows]) -> HiddenRows:
        """The states of several, one after the other."""
        return HiddenRows(
            torch.cat([part.hidden_NE for part in parts]), torch.cat([part.gold_logp_N for part in parts])
        )


CachedRows = SparseTargets | HiddenRows
"""Decoded targets of consecutive positions, on the CPU."""


class Codec(Protocol):
    """One format with its parameters.

    The same call gives the same bytes in every process. Random numbers are a function of the position and not
    of the batch, but a matrix product may depend on the batch in a logit's last bit.
    """

    def encode(self, targets: WholeTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
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

    def decode(self, blob: bytes | memoryview, tokens: int) -> CachedRows:
        """The targets of a blob of `tokens` positions; every blob gives the same number of ids per position.

        A writable buffer may be returned as a view of it, where nothing is to be unpacked.

        Raises:
            ValueError: the blob has another length than `tokens` positions take.
        """
        ...

    def bits_per_token(self) -> float:
        """Size of a position, for planning."""
        ...


def logit_chunks(
    targets: WholeTargets, labels_N: Tensor, first: int, vocab_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits_CV, gold_logp_C) chunk by chunk: float32, at T=1, of the real vocabulary, never [N, V].

    The logits are new memory, free to be overwritten. A label that marks no label is read as id 0.

    Raises:
        UserError: a distribution is not finite; the message names the place, counted from `first`.
        ValueError: the head is smaller than the vocabulary.
    """
    if targets.rows_of_head < vocab_size:
        raise ValueError(f"head of {targets.rows_of_head} rows: smaller than the vocabulary of {vocab_size}")
    size = max(1, _CHUNK_BYTES.get(labels_N.device.type, _ACCELERATOR_BYTES) // (4 * vocab_size))
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
    """Base of the formats that store a few ids per position: a blob is a row of bit-packed columns.

    Each chunk of logits is reduced to arrays with one row per position; blocks of rows are then packed. The
    columns are listed at each codec. Widths in bits: ids ceil(log2 V).
    """

    def __init__(self, settings: CodecSettings) -> None:
        self._settings = settings
        self._id_bits = width_of(settings.vocab_size)

    def encode(self, targets: WholeTargets, labels_N: Tensor, first: int, block: int) -> list[bytes]:
        """See `Codec`."""
        parts = []
        for rows, logits_CV, gold_C in logit_chunks(targets, labels_N, first, self._settings.vocab_size):
            places = np.arange(first + rows.start, first + rows.stop, dtype=np.int64)
            if self._settings.temperature != 1.0:  # a pass over memory
                logits_CV.div_(self._settings.temperature)
            parts.append(self._reduced(logits_CV, gold_C.cpu().numpy(), places))
        arrays = [np.concatenate(chunk) for chunk in zip(*parts, strict=True)]
        starts = range(0, len(labels_N), block)
        return [b"".join(self._columns(*(a[start : start + block] for a in arrays))) for start in starts]

    @abstractmethod
    def _reduced(
        self, logits_CV: Tensor, gold: NDArray[np.float32], places: NDArray[np.int64]
    ) -> tuple[Integers, ...]:
        """What is stored of a chunk; `logits_CV` are divided by the temperature and may be overwritten."""

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
        return SparseTargets(of(ids), of(probs), of(tail), of(gold), self._settings.temperature)


def scattered(
    used: NDArray[np.int64], flat: NDArray[np.integer[Any]], slots: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(ids [N, slots], which slots are used) of rows of `used` ids; unused slots repeat the first id."""
    is_used = np.arange(slots) < used[:, None]
    ids = np.empty(is_used.shape, np.int64)
    ids[:] = flat[np.cumsum(used) - used, None]
    ids[is_used] = flat
    return ids, is_used
