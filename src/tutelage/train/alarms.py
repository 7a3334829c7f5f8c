"""Notice what a person should look at: a loss far above its recent course, a rank slower than the others.

Each speaks once when it begins, and again only after it has ended in between.
"""

from __future__ import annotations

import statistics
from collections import deque

_RECENT = 32
_ENOUGH = 8
_DEVIATIONS = 6.0
_RELATIVE = 0.05
_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

_SLOWER = 1.5
_ROWS = 5
_NOTABLE = 0.02
"""Part of a step that a rank must lose to be worth a warning."""


class LossBand:
    """The course of the last 32 logged cross-entropies, as their median and median absolute deviation.

    One is a spike if it lies above the median by more than 6 robust standard deviations (1.4826 times the
    median absolute deviation) and by more than 5%; at least 8 must be known.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._outside = False

    def check(self, step: int, loss: float) -> str | None:
        """Take note of a logged cross-entropy; return a sentence if a spike begins with it."""
        outside, text = False, None
        if len(self._losses) >= _ENOUGH:
            median = statistics.median(self._losses)
            spread = _NORMAL * statistics.median(abs(one - median) for one in self._losses)
            above = max(_DEVIATIONS * spread, _RELATIVE * abs(median))
            outside = loss > median + above
            if outside and not self._outside:
                text = (
                    f"step {step:,}: cross-entropy {loss:.3f} is a spike: the median of the last "
                    f"{len(self._losses)} logged is {median:.3f}, and up to {median + above:.3f} is usual"
                )
        self._outside = outside
        self._losses.append(loss)
        return text


class Stragglers:
    """Ranks that take longer than the others at what each computes by itself.

    A rank is slow if, at 5 logged steps in a row, it takes more than 1.5 times the median of the others and
    that costs at least 2% of a step.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def check(self, step: int, own_seconds: list[float], step_seconds: float) -> str | None:
        """Take note of a logged step; return a sentence if a rank has become slow with it.

        Args:
            step: its number.
            own_seconds: of each rank, seconds of a step in which it waits for no other.
            step_seconds: of a whole step.
        """
        found = []
        for rank, mine in enumerate(own_seconds):
            others = own_seconds[:rank] + own_seconds[rank + 1 :]
            usual = statistics.median(others) if others else mine
            slow = mine > _SLOWER * usual and mine - usual > _NOTABLE * step_seconds
            self._rows[rank] = self._rows.get(rank, 0) + 1 if slow else 0
            if self._rows[rank] == _ROWS:
                found.append(f"rank {rank} takes {1e3 * mine:.1f} ms, the others {1e3 * usual:.1f} ms")
        if not found:
            return None
        return (
            f"step {step:,}: a straggler holds up all processes: at {_ROWS} logged steps in a row "
            f"{'; '.join(found)} to wait for data and to compute the objective"
        )
