"""Make the batches of a run ahead: a thread reads the tokens of the next steps while this one is computed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import torch

    from tutelage.data.loader import Loader
    from tutelage.types import Batch


class BatchesAhead:
    """The batches of consecutive steps on one rank, in pieces of one forward pass each.

    A batch is a function of its step, so nothing has to be kept for a resumed run, and what was made ahead in
    vain is dropped. For CUDA, batches are made in page-locked memory and copied without waiting.

    Args:
        loader: batches by step.
        first: the first step.
        piece: sequences of one forward pass.
        device: where batches are wanted.

    Attributes:
        waited: seconds the last `next_step` waited for its batch.
    """

    def __init__(self, loader: Loader, first: int, piece: int, device: torch.device) -> None:
        self._make = _maker(loader, pinned=device.type == "cuda")
        self._piece = piece
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._step = first
        self._coming: Future[Batch] = self._thread.submit(self._make, first)
        self.waited = 0.0

    def __enter__(self) -> Self:
        """Return the batches themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, which finishes the batch it is at."""
        self._thread.shutdown(cancel_futures=True)

    def next_step(self) -> list[Batch]:
        """Return the micro-batches of the next step, and have those of the step after it made.

        Raises:
            Exception: whatever went wrong where the batch was made.
        """
        began = time.perf_counter()
        batch = self._coming.result()
        self.waited = time.perf_counter() - began
        self._step += 1
        self._coming = self._thread.submit(self._make, self._step)
        batch = batch.to(self._device)
        starts = range(0, len(batch.starts), self._piece)
        return [batch.rows(slice(start, start + self._piece)) for start in starts]


def _maker(loader: Loader, *, pinned: bool) -> Callable[[int], Batch]:
    if not pinned:
        return loader.batch
    return lambda step: loader.batch(step).pinned()
