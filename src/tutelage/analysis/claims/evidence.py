"""The numbers that claims are tested on: one per seed, taken from a study's gains, raw or fitted.

Whatever is chosen (an alpha, a schedule, a teacher) is fixed in the study file or chosen on seeds that are
not tested. To choose for each seed by the other seeds looks as good and is not: every number is unbiased, but
they depend on each other, and a t test finds effects where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from tutelage.analysis.gains import twins_of
from tutelage.analysis.stats import POWER, Evidence, differs, exceeds, seeds_needed, stays_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tutelage.analysis.gains import Fit, Side
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.plan import Plan, PlanRun, PlanStudent, PlanTeacher
    from tutelage.study.results import Results

Statement = Literal["above 0", "below 0", "within", "not below", "not 0"]
Direction = Literal["support", "contradict"]

MARGIN = 0.5
"""Gains in percent of the bits per byte that differ by less count as the same."""


@dataclass(frozen=True, slots=True)
class Test:
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
class Requirement:
    """Something a claim cannot do without.

    Attributes:
        what: completes "no runs with".
        met: whether a plan has it, given its runs with a real teacher.
    """

    what: str
    met: Callable[[Plan, Sequence[tuple[PlanRun, PlanStudent, PlanTeacher]]], bool]


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement that a study can test.

    Attributes:
        text: the statement.
        requirements: what a plan must have.
        tests: its tests; all must hold.
        remark: more to know about the result, as sentences.
        primary: the gains that decide it; the others are shown beside it.
        in_family: whether it can be announced. One that cannot is shown and never counted.
    """

    text: str
    requirements: tuple[Requirement, ...]
    tests: Callable[[GainsBySeed], list[Test]]
    remark: Callable[[GainsBySeed], str] = lambda _: ""
    primary: Fit = "raw"
    in_family: bool = True


Series = dict[int, float]
"""One number per seed."""
Members = dict[str, Series]
"""What a mean is over, by name: pairs of student and teacher, mostly."""
CHOOSING = 3
"""One seed of so many, and at least one, chooses; the others are tested."""


def minus(first: Series, second: Series) -> Series:
    """Difference on the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def mean_of(many: Iterable[Series]) -> Series:
    """Mean of all on each seed that all have, so that every number is a mean of the same things.

    Seeds are the replicates. Numbers that are means of the same things are alike except for their seed, which
    is what a t test needs; a mean over whatever a seed has is not.
    """
    filled = [*many]
    seeds = set.intersection(*(set(one) for one in filled)) if filled else set()
    return {seed: fmean(one[seed] for one in filled) for seed in sorted(seeds)}


def has_setting(arm: Mapping[str, Any], name: str, *values: object) -> bool:
    """Whether an arm has one of `values` as a setting; a section counts by its kind or policy."""
    given = arm.get(name)
    return (given.get("kind", given.get("policy")) if isinstance(given, dict) else given) in values


def without(arm: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The arm without some of its settings."""
    return {name: value for name, value in arm.items() if name not in names}


def choosing_seeds(plan: Plan) -> frozenset[int]:
    """The first third of a study's seeds, at least one: they choose what its file does not fix."""
    seeds = sorted(set(plan.seeds))
    return frozenset(seeds[: max(1, len(seeds) // CHOOSING)])


def named(pair: PairFinding) -> str:
    """`tiny 2M from weak`."""
    return f"{pair.student.name} from {pair.teacher.name}"


def cell_name(cell: Verdict) -> str:
    """`tiny 2M from weak, alpha 0.2`."""
    return f"{cell.student} from {cell.teacher}, {cell.arm}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several ways to use a teacher.

    Attributes:
        cells: one, or several of different seeds that are one way together; empty if none could be chosen.
        untested: seeds that chose it; their numbers are no evidence.
    """

    cells: tuple[Verdict, ...]
    untested: frozenset[int] = frozenset()

    def tested(self, gains: Series) -> Series:
        """The numbers of seeds that had no part in the choice."""
        return {seed: gain for seed, gain in gains.items() if seed not in self.untested}


class GainsBySeed:
    """Gains of a study by seed, with one fit, of the test split; choices use raw validation gains.

    Attributes:
        choosing: the seeds that choose where the study file does not: the first third of its seeds.
    """

    def __init__(self, results: Results, findings: Findings, fit: Fit = "raw") -> None:
        self.results = results
        self.findings = findings
        self.plan = results.plan
        self.fit = fit
        self.verdicts: tuple[Verdict, ...] = findings.verdicts
        self.choosing = choosing_seeds(results.plan)
        self._alphas = {teacher.name: teacher.tested_alpha for teacher in results.plan.teachers}
        self._gains: dict[tuple[int, str], Series] = {}
        self._valid: dict[int, Series] = {}
        sides = findings.gains.sides
        tested = sides.filter(split="test", fit=fit)
        for cell, role, seed, gain in tested.select("cell", "role", "seed", "gain").iter_rows():
            self._gains.setdefault((cell, role), {})[seed] = gain
        chosen = sides.filter(
            pl.col("seed").is_in([*self.choosing]), split="validation", fit="raw", role="out_of_domain"
        )
        for cell, seed, gain in chosen.select("cell", "seed", "gain").iter_rows():
            self._valid.setdefault(cell, {})[seed] = gain
        self._cells: dict[tuple[str, str | None, str | None], list[Verdict]] = {}
        for verdict in self.verdicts:
            self._cells.setdefault((verdict.student, verdict.teacher, verdict.stage), []).append(verdict)

    def gain(self, verdict: Verdict, side: Side) -> Series:
        """Gain of a cell by seed."""
        return self._gains.get((verdict.cell, side), {})

    def arms(self, student: str, teacher: str | None, stage: str | None = None) -> list[Verdict]:
        """The cells of a student and a teacher."""
        return self._cells.get((student, teacher, stage), [])

    def constants(self, pair: PairFinding, keep: Callable[[float], bool] = lambda _: True) -> list[Verdict]:
        """The cells of a pair whose arm is a constant alpha that `keep` accepts."""
        cells = self.arms(pair.student.name, pair.teacher.name)
        return [v for v in cells if v.constant and v.alpha is not None and keep(v.alpha)]

    def pairs(self, *relations: str) -> list[PairFinding]:
        """Pairs with an ordinary teacher, of the given measured relations; default: of all.

        An ordinary teacher was trained on the study's corpus in another data order than its students and is
        distilled from its full distribution. The others have claims of their own, and would change what a
        mean is over.
        """
        return [
            pair
            for pair in self.all_pairs()
            if (not relations or pair.relation in relations)
            and (pair.teacher.corpus, pair.teacher.targets, pair.teacher.of) == (None, None, ())
            and self._seeds(pair) != {pair.teacher.data_seed}
        ]

    def all_pairs(self) -> list[PairFinding]:
        """Pairs with any real teacher and constant alphas."""
        return [pair for pair in self.findings.pairs if not pair.teacher.control and self.constants(pair)]

    def _seeds(self, pair: PairFinding) -> set[int]:
        return {seed for cell in self.constants(pair) for seed in self.gain(cell, "out_of_domain")}

    def candidates(self, cells: Iterable[Verdict]) -> list[Choice]:
        """The cells to choose from: of a teacher with a `tested_alpha`, only the cell that has it."""
        found = [*cells]
        fixed = {cell.teacher for cell in found if self._is_fixed(cell)}
        return [Choice((cell,)) for cell in found if cell.teacher not in fixed or self._is_fixed(cell)]

    def _is_fixed(self, cell: Verdict) -> bool:
        return cell.constant and cell.teacher is not None and cell.alpha == self._alphas[cell.teacher]

    def choose(self, candidates: Sequence[Choice]) -> Choice:
        """The best by its raw validation gain out of domain, mean over the choosing seeds.

        One candidate is no choice, and all its seeds are tested. Of several, those that lack one of the
        choosing seeds cannot be chosen.
        """
        if len(candidates) == 1:
            return candidates[0]
        known = [(one, self.validation(one)) for one in candidates]
        able = [(one, mean) for one, mean in known if mean is not None]
        best = max(able, key=lambda pair: pair[1])[0] if able else Choice(())
        return Choice(best.cells, self.choosing)

    def validation(self, choice: Choice) -> float | None:
        """Mean validation gain over the choosing seeds; None if one of them is missing."""
        gains = {seed: v for cell in choice.cells for seed, v in self._valid.get(cell.cell, {}).items()}
        return fmean(gains.values()) if set(gains) == self.choosing else None

    def best(self, cells: Iterable[Verdict], side: Side) -> Series:
        """Gain of the best of `cells`, of tested seeds."""
        return self.gain_of(self.choose(self.candidates(cells)), side)

    def gain_of(self, choice: Choice, side: Side) -> Series:
        """Gain of what was chosen, of tested seeds."""
        joined = {seed: gain for cell in choice.cells for seed, gain in self.gain(cell, side).items()}
        return choice.tested(joined)

    def texts(self, choice: Choice) -> Members:
        """Gain of what was chosen on each text out of domain, of tested seeds."""
        found: Members = {}
        for cell in choice.cells:
            for text, gains in self._by_text.get(cell.cell, {}).items():
                found.setdefault(text, {}).update(choice.tested(gains))
        return found

    @cached_property
    def _by_text(self) -> dict[int, Members]:
        """Gains out of domain of every cell, by text and seed."""
        rows = self.findings.gains.domains.filter(split="test", fit=self.fit, role="out_of_domain")
        found: dict[int, Members] = {}
        for cell, text, seed, gain in rows.select("cell", "domain", "seed", "gain").iter_rows():
            found.setdefault(cell, {}).setdefault(text, {})[seed] = gain
        return found

    def variants(
        self, name: str, value: object, *others: str, alpha: float | None = None
    ) -> list[tuple[Verdict, Verdict]]:
        """Cells before any stage with a setting, each with the cell without it and without `others`."""
        return [
            (cell, other)
            for cell in self.verdicts
            if has_setting(cell.arm_settings, name, value)
            and cell.stage is None
            and alpha in {None, cell.alpha}
            for other in self.arms(cell.student, cell.teacher)
            if other.arm_settings == without(cell.arm_settings, name, *others)
        ]

    def change(self, variants: Iterable[tuple[Verdict, Verdict]], side: Side) -> Members:
        """Gain of variants minus that of the plain cells."""
        return {
            cell_name(one): minus(self.gain(one, side), self.gain(other, side)) for one, other in variants
        }

    @cached_property
    def runs(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(cell, seed) of a run and the baseline that it is compared with."""
        pairs = self.findings.gains.domains.select("run", "base_run", "cell", "seed").unique()
        return {(run, base): (cell, seed) for run, base, cell, seed in pairs.iter_rows()}

    def scores(self, metric: str, domain: str) -> dict[tuple[int, int], tuple[float, list[float]]]:
        """(score, scores of the baseline and its twins) of a metric on one domain, by cell and seed.

        Of the test split, or of a probe; where one of them was not scored, or in another way, there is no
        entry.
        """
        known = self.results.scores.filter(metric=metric, domain=domain, split="test")
        values = dict(known.select("run", "value").iter_rows())
        versions = dict(known.select("run", "version").iter_rows())
        twins: dict[str, list[str]] = {}
        for base, run in twins_of(self.results).iter_rows():
            twins.setdefault(base, []).append(run)
        return {
            place: (values[run], [values[twin] for twin in twins[base]])
            for (run, base), place in self.runs.items()
            if run in values and {versions.get(twin) for twin in twins[base]} == {versions[run]}
        }
