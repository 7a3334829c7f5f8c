"""Find where documents begin in a window of a split, and the place of every token in its document.

A window is cut where the sequence length says, so it may begin in the middle of a document. What came before
is not in the window, so its positions begin with 0 there too.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tutelage.data.store import SplitView

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
