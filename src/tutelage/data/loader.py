"""Compute the batch of a step as a pure function of (seed, step, rank).

The tokens of a split are cut into windows of T tokens; every epoch visits every window once, in an
order of its own. The order needs no memory and no state: it is computed from the seed, so a run that
resumes, or runs on more ranks, sees the same batches.

A window is cut where the sequence length says, so it may begin in the middle of a document. What came before
is not in the window, so its positions begin with 0 there too.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.config.runtime_config import uneven
from tutelage.data.hashing import permuted
from tutelage.errors import UserError
from tutelage.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tutelage.config.run_config import RunConfig
    from tutelage.data.store import SplitView, Store

_SAMPLES_AT_ONCE = 2**18


class Loader:
    """Batches of packed sequences from one split of a token store.

    Sample g of the run (g = step * sequences_per_step + place in the step) is window
    permutation(g mod n) of epoch g div n, where n is the number of windows. A step may span two epochs.

    Where the split has a mask, tokens of prompts are read like all others but are no labels. If documents are
    kept apart, batches have positions, and the token that closes a document has no label: what comes next
    is another text.

    Args:
        split: the tokens.
        sequence_length: T, tokens per sequence. Labels are the next tokens, so window w reads the T + 1
            tokens from w * T on.
        sequences_per_step: sequences of one optimizer step, over all ranks.
        seed: of the order.
        documents: keep the documents of a sequence apart.
        rank: this process, from 0; it gets the rank-th contiguous slice of the step's sequences.
        world_size: number of processes.

    Raises:
        UserError: the split is shorter than one sequence, or the sequences do not divide by the ranks.
    """

    def __init__(
        self,
        split: SplitView,
        sequence_length: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        documents: bool = False,
    ) -> None:
        self.n_windows = max(0, len(split.tokens) - 1) // sequence_length
        if self.n_windows == 0:
            raise UserError(
                f"the split has {len(split.tokens)} tokens, one sequence needs {sequence_length + 1} "
                f"(sequence_length = {sequence_length} and the token after it); add text, or make it shorter"
            )
        if (reason := uneven(sequences_per_step, world_size)) is not None:
            raise UserError(reason)
        self._tokens, self._mask = split.tokens, split.mask
        self._documents = Documents(split) if documents else None
        self._length = sequence_length
        self._per_step = sequences_per_step
        self._seed = seed
        share = sequences_per_step // world_size
        self._slice = slice(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> float:
        """Steps that visit every window exactly once; epochs need not end between steps."""
        return self.n_windows / self._per_step

    def windows(self, step: int) -> NDArray[np.int64]:
        """Return the windows of this rank in `step`, in order; window w begins at token w T of the split."""
        first = step * self._per_step
        return self._windows_of(np.arange(first, first + self._per_step, dtype=np.int64)[self._slice])

    def unlabelled(self, steps: int) -> int:
        """Count the steps among the first `steps` without a label on any rank, which only a mask can cause.

        Reads the whole mask once.
        """
        if self._mask is None:
            return 0
        labels = self._mask[1 : self.n_windows * self._length + 1]
        labelled_W = np.any(labels.reshape(self.n_windows, self._length), axis=1)
        if labelled_W.all():
            return 0
        found, at_once = 0, max(1, _SAMPLES_AT_ONCE // self._per_step)
        for step in range(0, steps, at_once):
            samples = np.arange(step * self._per_step, min(steps, step + at_once) * self._per_step)
            labelled = labelled_W[self._windows_of(samples)].reshape(-1, self._per_step).any(1)
            found += int((~labelled).sum())
        return found

    def _windows_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(samples, self.n_windows)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            windows[now] = permuted(places[now], self.n_windows, self._seed, int(epoch))
        return windows

    def batch(self, step: int) -> Batch:
        """Return token ids, next-token labels and positions of this rank in `step`, int64 [sequences, T]."""
        starts = self.windows(step) * self._length
        rows = np.stack([self._tokens[start : start + self._length + 1] for start in starts])
        ids = torch.from_numpy(rows.astype(np.int64))
        labels = ids[:, 1:].clone()  # of one row the slice is contiguous and would share the inputs' memory
        if self._mask is not None:
            marks = np.stack([self._mask[start + 1 : start + self._length + 1] for start in starts])
            labels.masked_fill_(torch.from_numpy(marks == 0), IGNORE_INDEX)
        positions = None
        if self._documents is not None:
            begins = self._documents.begins(starts.tolist(), self._length + 1)
            labels.masked_fill_(torch.from_numpy(begins[:, 1:]), IGNORE_INDEX)
            positions = torch.from_numpy(positions_of(begins[:, :-1]))
        return Batch(ids[:, :-1].contiguous(), labels, tuple(starts.tolist()), positions)


def run_loader(config: RunConfig, store: Store, steps: int, rank: int = 0, world_size: int = 1) -> Loader:
    """The batches of a run, none of them without a label.

    Raises:
        UserError: as `Loader`, or some of its steps have nothing to learn.
    """
    length = config.data.sequence_length
    loader = Loader(
        store.split("train"),
        sequence_length=length,
        sequences_per_step=config.global_batch_tokens // length,
        seed=config.data.seed,
        rank=rank,
        world_size=world_size,
        documents=bool(config.data.document_mask),
    )
    if empty := loader.unlabelled(steps):
        raise UserError(
            f"{store.path}: {empty} of the {steps} steps would see no token of a completion, so there is "
            "nothing to learn from; raise global_batch_tokens or data.sequence_length"
        )
    return loader


_FIRST_TOKEN = itemgetter(0)


class Documents:
    """Where the documents of a split begin, as the store's index has it; nothing of it is copied.

    An end-of-text id would not do: a chat template may write it after every turn of a conversation.

    Args:
        split: the tokens and their index, mapped from disk.
    """

    def __init__(self, split: SplitView) -> None:
        self._index = np.asarray(split.offsets)[:-1]  # without the row of totals

    def begins(self, starts: Sequence[int], length: int) -> NDArray[np.bool_]:
        """Return whether a document begins with each token of the windows.

        Args:
            starts: places of their first tokens in the split.
            length: tokens of each; may reach beyond the end of the split.

        Returns:
            bool [windows, length].
        """
        begins = np.zeros((len(starts), length), bool)
        for window, start in enumerate(starts):
            first = bisect_left(self._index, start, key=_FIRST_TOKEN)
            end = bisect_left(self._index, start + length, lo=first, key=_FIRST_TOKEN)
            begins[window, self._index[first:end, 0].astype(np.int64) - start] = True
        return begins


def positions_of(begins_BT: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Compute the place of every token in its document, from 0.

    Args:
        begins_BT: as `Documents.begins` gives them. The first token of a window has place 0 in any case.

    Returns:
        int64 [B, T].
    """
    places_T = np.arange(begins_BT.shape[1])
    return places_T - np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
