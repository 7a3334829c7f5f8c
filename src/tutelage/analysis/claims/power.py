"""Say what a plan can decide before it is run: for each claim the smallest effect that it would find.

The planned study is drawn a few times with noise and no effect, and the tests of its claims are made of each
draw as they are of a real study. So the number of tested seeds, what a mean is over and what shares its noise
are those of the tests themselves. From the spread of their numbers follows the smallest effect, by the
noncentral t.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, inf, sqrt
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from tutelage.analysis.claims.judge import LEVEL
from tutelage.analysis.claims.noise import KINDS
from tutelage.analysis.claims.planned_study import PlannedStudy
from tutelage.analysis.claims.registry import CLAIMS, missing_of
from tutelage.analysis.stats import MOST_SEEDS, POWER, chance_inside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.analysis.claims.evidence import Test
    from tutelage.analysis.claims.noise import Noise
    from tutelage.study.plan import Plan

REPORTED_GAIN = 1.3
"""Percent of the bits per byte that a study should find: what a weaker teacher gains in arXiv 2605.23857
(second hand) and the whole distribution in arXiv 2503.16870, where a renormalised top-k loses 5% or more."""
REPORTED_DOUBLINGS = 1.0
"""Of a calibration error that is "several times" the other's, beyond the first doubling."""
_NUMBERS = 400
"""Degrees of freedom behind a spread: it is known to 4%."""
_MOST_DRAWS = 120
_MOST_RUNS = 25_000
"""Drawn runs that take seconds; larger studies are drawn less often, four times at least."""
_TWO = 2
_STEPS = 40
_LARGE = 100
_LEAST = 1e-9
"""Deviation of numbers that do not differ."""


@dataclass(frozen=True, slots=True)
class TestPower:
    """What one test of a claim can find.

    Attributes:
        label: what the numbers are.
        reads: the statement about their mean.
        unit: of the numbers.
        n: tested seeds.
        deviation: of the numbers over seeds; 0 with less than two.
        smallest: the mean nearest to its bound at which the statement would be shown with the power asked
            for. Of a statement "within a margin" the largest mean; of "different from 0" its size. None: at
            no mean.
        words: the same for people.
        enough: whether an effect as large as those reported would be shown; of a margin, no effect.
    """

    label: str
    reads: str
    unit: str
    n: int
    deviation: float
    smallest: float | None
    words: str
    enough: bool


@dataclass(frozen=True, slots=True)
class ClaimPower:
    """What a plan can find of one announced claim.

    Attributes:
        number: in CLAIMS.
        text: the claim.
        tests: its tests; none where the plan lacks runs.
        lacking: "no runs with ...", or why there are no tests.
    """

    number: int
    text: str
    tests: tuple[TestPower, ...]
    lacking: str

    @property
    def enough(self) -> bool:
        """Whether all its tests would find an effect as large as those reported."""
        return bool(self.tests) and all(test.enough for test in self.tests)


@dataclass(frozen=True, slots=True)
class StudyPower:
    """What a plan can decide.

    Attributes:
        study: its name.
        claims: every announced claim of the family.
        level: two-sided level of each claim: the strictest that Holm's correction can ask for.
        noise: what it was computed from.
        deviations: standard deviation over seeds of one gain of this plan, by kind: alpha below 1, and 1.
    """

    study: str
    claims: tuple[ClaimPower, ...]
    level: float
    noise: Noise
    deviations: Mapping[str, tuple[float, float]]

    @property
    def weak(self) -> list[int]:
        """Claims that effects as large as those reported would not decide."""
        return [claim.number for claim in self.claims if not claim.enough]


def power_of(plan: Plan, noise: Noise) -> StudyPower:
    """Compute what a plan can decide; needs no run of it.

    Raises:
        UserError: it announces a claim that does not exist.
    """
    lacking = missing_of(plan)
    family = [number for number in plan.claims if CLAIMS[number].in_family]
    level = LEVEL / max(1, len(family))
    able = [number for number in family if number not in lacking]
    tests = _tests(plan, noise, able) if able else {}
    twins = 1 + max(run.twin for run in plan.runs)
    return StudyPower(
        study=plan.name,
        claims=tuple(
            ClaimPower(
                number,
                CLAIMS[number].text,
                tuple(_test_power(test, values, level, len(tests[number])) for test, values in tests[number])
                if number in tests
                else (),
                lacking.get(number, ""),
            )
            for number in family
        ),
        level=level,
        noise=noise,
        deviations={kind: (noise.gain(kind, twins), noise.gain(kind, twins, alone=True)) for kind in KINDS},
    )


def _tests(
    plan: Plan, noise: Noise, numbers: Sequence[int]
) -> dict[int, list[tuple[Test, list[list[float]]]]]:
    """The deciding tests of claims with their numbers in each draw of the study."""
    drawn = PlannedStudy(plan, noise)
    most = min(_MOST_DRAWS, max(4, _MOST_RUNS // len(plan.runs)))
    draws = min(most, ceil(_NUMBERS / max(1, len(plan.seeds) - 1)))
    found: dict[int, list[tuple[Test, list[list[float]]]]] = {}
    for by_fit in drawn.studies(draws, {CLAIMS[number].primary for number in numbers}):
        for number in numbers:
            claim = CLAIMS[number]
            tests = [test for test in claim.tests(by_fit[claim.primary]) if not test.beside]
            known = found.setdefault(number, [(test, []) for test in tests])
            for (_, values), test in zip(known, tests, strict=False):
                values.append([*test.values.values()])
    return found


def _test_power(test: Test, values: Sequence[Sequence[float]], level: float, tests: int) -> TestPower:
    """The power of one of several tests, which all have to hold."""
    n = min(len(one) for one in values)
    deviation, smallest = 0.0, None
    if n >= _TWO:
        deviation = sqrt(fmean(float(np.var(one, ddof=1)) for one in values)) or _LEAST
        smallest = _smallest(test, min(n, MOST_SEEDS), deviation, level, POWER ** (1 / tests))
    said = _said(test, smallest) if n >= _TWO else "never: one tested seed has no spread"
    enough = smallest is not None and _enough(test, smallest)
    return TestPower(test.label, test.reads(), test.unit, n, deviation, smallest, said, enough)


def _said(test: Test, smallest: float | None) -> str:
    if smallest is None:
        return "never: the noise is too large for the margin"
    unit = test.unit if test.unit == "%" else f" {test.unit}"
    size = f"{abs(smallest):.2g}" if abs(smallest) < _LARGE else f"{abs(smallest):.0f}"
    if test.statement == "within":
        return f"true ones up to ±{size}{unit}"
    if test.statement == "not 0":
        return f"±{size}{unit} or more"
    return (
        f"{'-' if smallest < 0 else '+'}{size}{unit} or {'less' if test.statement == 'below 0' else 'more'}"
    )


def _enough(test: Test, smallest: float) -> bool:
    if test.statement in {"within", "not below"}:
        return test.statement == "within" or smallest <= 0
    return abs(smallest) <= {"%": REPORTED_GAIN, "log2": REPORTED_DOUBLINGS}.get(test.unit, inf)


def _smallest(test: Test, n: int, deviation: float, level: float, power: float) -> float | None:
    """The mean nearest to the bound of its statement at which it is shown with that power."""
    if test.statement == "within":
        if _chance(n, 0.0, deviation, test.margin, level) < power:
            return None
        low, high = 0.0, test.margin
        for _ in range(_STEPS):
            middle = (low + high) / 2
            enough = _chance(n, middle, deviation, test.margin, level) >= power
            low, high = (middle, high) if enough else (low, middle)
        return low
    distance = deviation * _distance(n, level, power)
    return {"below 0": -distance, "not below": distance - test.margin}.get(test.statement, distance)


def _chance(n: int, mean: float, deviation: float, margin: float, level: float) -> float:
    return float(chance_inside(np.array([n]), mean, deviation, -margin, margin, level)[0])


@cache
def _distance(n: int, level: float, power: float) -> float:
    """Standard deviations from a bound at which a one-sided test has that power."""
    low, high = 0.0, 1.0
    while float(chance_inside(np.array([n]), high, 1.0, 0.0, inf, level)[0]) < power:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = float(chance_inside(np.array([n]), middle, 1.0, 0.0, inf, level)[0]) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
