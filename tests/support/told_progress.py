"""A `Progress` that remembers what it was told."""

from __future__ import annotations

from tutelage.progress import NullProgress


class Told(NullProgress):
    """Notes, and amounts of every stage: wanted, unit, and all that was done, in order; "done" at its end."""

    def __init__(self) -> None:
        self.stages: dict[str, list[object]] = {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        self.stages[stage] = [total, unit]

    def advance(self, stage: str, done: float) -> None:
        self.stages[stage].append(done)

    def finish(self, stage: str, outcome: str = "done") -> None:
        self.stages[stage].append(outcome)
