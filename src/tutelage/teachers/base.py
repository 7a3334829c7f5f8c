"""What a teacher is: something that gives a next-token distribution for every position of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tutelage.types import Batch, DenseTargets


class Teacher(Protocol):
    """A frozen teacher; losses never know which kind they have.

    Attributes:
        vocab_size: number of token ids it gives probability to; must equal the student's.
        forward_flops: FLOPs of its forward pass per token, for the cost ledger.
    """

    vocab_size: int
    forward_flops: float

    def targets(self, batch: Batch) -> DenseTargets:
        """Distributions for all B*T positions of `batch`, flattened row by row, without gradient."""
        ...
