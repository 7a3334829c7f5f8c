"""Parts of a claim: some numbers, one per seed, and the statement that they are to be tested against."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

from tutelage.analysis.stats import POWER, Evidence, differs, exceeds, seeds_needed, stays_within
from tutelage.analysis.view import Members, mean_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.analysis.gains import Fit
    from tutelage.analysis.view import Series, View
    from tutelage.study.planfile import Plan

Statement = Literal["above 0", "below 0", "within", "not below", "not 0"]
Direction = Literal["support", "contradict"]

MARGIN = 0.5
"""Gains in percent of the bits per byte that differ by less count as the same."""


@dataclass(frozen=True, slots=True)
class Part:
    """One test of a claim.

    Attributes:
        label: what the numbers are.
        members: numbers by seed of everything that the claim speaks of; empty if there are no runs for it.
        statement: what the claim says of their mean; "within" and "not below" are of `margin`.
        margin: half the width of no difference, in the units of the values.
        unit: of the values.
        beside: whether it is shown beside the claim and is no part of its answer.
    """

    label: str
    members: Members
    statement: Statement
    margin: float = MARGIN
    unit: str = "%"
    beside: bool = False

    @property
    def values(self) -> Series:
        """Mean over all members by seed, on the seeds that all of them have."""
        return mean_of(self.members.values())

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

    def direction(self) -> Direction:
        """What the mean speaks for; nothing can contradict "not 0"."""
        evidence = self.evidence()
        return "support" if evidence.support <= evidence.contradict else "contradict"

    def seeds_needed(self, level: float, power: float = POWER) -> int | None:
        """Seeds that would settle it in its `direction` with that power; None: more than a hundred."""
        numbers = [*self.values.values()]
        mean = sum(numbers) / len(numbers)
        low, high = {
            "above 0": (0.0, inf),
            "below 0": (-inf, 0.0),
            "within": (-self.margin, self.margin),
            "not below": (-self.margin, inf),
            "not 0": (0.0, inf) if mean > 0 else (-inf, 0.0),
        }[self.statement]
        if self.direction() == "support":
            return seeds_needed(numbers, low, high, level=level, power=power)
        if low == -inf or (high != inf and mean > 0):
            return seeds_needed(numbers, high, inf, level=level, power=power)
        return seeds_needed(numbers, -inf, low, level=level, power=power)

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
        primary: the gains that decide it; the others are shown beside it.
        in_family: whether it can be announced. One that cannot is shown and never counted.
    """

    text: str
    needs: tuple[Need, ...]
    parts: Callable[[View], list[Part]]
    remark: Callable[[View], str] = lambda _: ""
    primary: Fit = "raw"
    in_family: bool = True
