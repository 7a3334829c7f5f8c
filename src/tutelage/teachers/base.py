"""What a teacher is: something that gives a next-token distribution for every position of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.cacheformats import Format
    from tutelage.types import Batch, Targets


class Teacher(Protocol):
    """A frozen teacher; losses never know which kind they have.

    Attributes:
        vocab_size: number of token ids it gives probability to; at least the student's.
        kept: what is kept of its distributions; None if they are whole.
        forward_flops: FLOPs of its forward pass per token, for the cost ledger; 0 if it was paid before.
        notes: what the user should know about it, for example what was assumed.
    """

    vocab_size: int
    kept: Format | None
    forward_flops: float
    notes: tuple[str, ...]

    def expect(self, batches: Sequence[Batch]) -> None:
        """Learn what will be asked for next, so that it can be fetched meanwhile; may do nothing."""

    def targets(self, batch: Batch) -> Targets:
        """Distributions for all B*T positions of `batch`, flattened row by row, without gradient."""
        ...
