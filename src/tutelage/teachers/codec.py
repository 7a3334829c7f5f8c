"""What a format of a teacher cache is: targets in, blobs out, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tutelage.errors import UserError
from tutelage.objective.objective import dense_logits
from tutelage.types import DenseTargets, SparseTargets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

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
