"""Report how far long work is; what a person sees of it is `tutelage.cli.bars`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Progress(Protocol):
    """Receives how far work is. Work has stages, known by name; several may be under way at once."""

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        """Begin a stage.

        Args:
            stage: its name, as people read it.
            total: amount of work; None if it is not known.
            unit: of `total` and `done`: steps, tokens, bytes; "" shows a percentage only.
            done: amount that was finished earlier.
        """

    def advance(self, stage: str, done: float) -> None:
        """Set the amount of a stage that is done. Called at every step, so it must be cheap."""

    def describe(self, stage: str, figures: Mapping[str, float | str]) -> None:
        """Replace the measured figures of a stage, such as its loss and speed, by name."""

    def finish(self, stage: str, outcome: str = "done") -> None:
        """End a stage, begun or not."""

    def note(self, text: str) -> None:
        """Tell the user something."""


class NullProgress:
    """A `Progress` that ignores everything."""

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        """Do nothing."""

    def advance(self, stage: str, done: float) -> None:
        """Do nothing."""

    def describe(self, stage: str, figures: Mapping[str, float | str]) -> None:
        """Do nothing."""

    def finish(self, stage: str, outcome: str = "done") -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def counter(progress: Progress, stage: str) -> Callable[[int], None]:
    """A function that advances `stage` by the amount it is called with."""
    done = 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        progress.advance(stage, done)

    return add


@contextlib.contextmanager
def staged(progress: Progress, stage: str, total: float, unit: str) -> Iterator[Callable[[int], None]]:
    """A stage that lasts as long as the block; yields the function that advances it."""
    progress.start(stage, total, unit)
    yield counter(progress, stage)
    progress.finish(stage)
