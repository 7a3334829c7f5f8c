"""Parts of a claim: some numbers, one per seed, and the statement that they are to be tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.analysis.stats import Evidence, differs, exceeds, seeds_needed, stays_within

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.analysis.view import Series, View
    from tutelage.study.planfile import Plan

Statement = Literal["above 0", "below 0", "within", "not below", "not 0"]

MARGIN = 0.5
"""Gains in percent of the bits per byte that differ by less count as the same."""


@dataclass(frozen=True, slots=True)
class Part:
    """One test of a claim.

    Attributes:
        label: what the numbers are.
        values: by seed; empty if there are no runs for it.
        statement: what the claim says of their mean; "within" and "not below" are of `margin`.
        margin: half the width of no difference, in the units of the values.
        unit: of the values.
    """

    label: str
    values: Series
    statement: Statement
    margin: float = MARGIN
    unit: str = "%"

    def evidence(self) -> Evidence:
        """Give the p values for and against; needs two seeds."""
        numbers = [*self.values.values()]
        if self.statement == "within":
            return stays_within(numbers, self.margin)
        if self.statement == "not 0":
            return differs(numbers)
        if self.statement == "below 0":
            return exceeds([-number for number in numbers])
        return exceeds(numbers, -self.margin if self.statement == "not below" else 0.0)

    def seeds_needed(self, level: float) -> int | None:
        """Seeds that would settle it if mean and spread stayed what they are; None: more than a hundred."""
        numbers = [*self.values.values()]
        if self.statement not in {"within", "not below"}:
            return seeds_needed(numbers, 0.0, level)
        bounds = [-self.margin] if self.statement == "not below" else [-self.margin, self.margin]
        counts = [seeds_needed(numbers, bound, level) for bound in bounds]
        known = [count for count in counts if count is not None]
        return max(known) if len(known) == len(counts) else None

    def reads(self) -> str:
        """The statement in words."""
        margin = f"{self.margin:g}{self.unit if self.unit == '%' else ' ' + self.unit}".strip()
        return {
            "within": f"within {margin} of 0",
            "not below": f"at most {margin} below 0",
            "not 0": "different from 0",
        }.get(self.statement, self.statement)


@dataclass(frozen=True, slots=True)
class Need:
    """Something a claim cannot do without.

    Attributes:
        what: completes "no runs with".
        met: whether a plan has it.
    """

    what: str
    met: Callable[[Plan], bool]


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement that a study can test.

    Attributes:
        text: the statement.
        needs: what a plan must have.
        parts: its tests; all must hold.
        remark: more to know about the result, as sentences.
    """

    text: str
    needs: tuple[Need, ...]
    parts: Callable[[View], list[Part]]
    remark: Callable[[View], str] = lambda _: ""
