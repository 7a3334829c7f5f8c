"""What claims are made of: one number per seed, taken from a study's gains as they are or with one fit."""

from __future__ import annotations

from math import inf
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tutelage.analysis.gains import Fit, Side
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict
    from tutelage.study.results import Results

Series = dict[int, float]
"""One number per seed."""


def minus(first: Series, second: Series) -> Series:
    """Difference on the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def mean_of(many: Iterable[Series]) -> Series:
    """Mean on the seeds that all have; only of those that have the most seeds."""
    filled = [one for one in many if one]
    most = max((len(one) for one in filled), default=0)
    whole = [one for one in filled if len(one) == most]
    seeds = set.intersection(*(set(one) for one in whole)) if whole else set()
    return {seed: fmean(one[seed] for one in whole) for seed in sorted(seeds)}


def _joined(parts: Iterable[Series]) -> Series:
    return {seed: value for part in parts for seed, value in part.items()}


def _mean_but(seed: int, values: Series) -> float:
    """Mean over the other seeds; with none, the value of this one."""
    return fmean([value for other, value in values.items() if other != seed] or [values[seed]])


def says(arm: str, phrase: str) -> bool:
    """Whether one of the settings that an arm names begins with `phrase`."""
    return any(f"{setting} ".startswith(f"{phrase} ") for setting in arm.split(", "))


def without(arm: str, *phrases: str) -> str:
    """The arm less the settings that begin with one of `phrases`."""
    return ", ".join(s for s in arm.split(", ") if not any(says(s, phrase) for phrase in phrases))


class View:
    """A study seen through one fit: gains are on the test split, choices are made on raw validation gains."""

    def __init__(self, results: Results, findings: Findings, fit: Fit = "raw") -> None:
        self.results = results
        self.findings = findings
        self.plan = results.plan
        self.verdicts: tuple[Verdict, ...] = findings.verdicts
        self._gains: dict[tuple[int, str], Series] = {}
        self._valid: dict[int, Series] = {}
        for cell, seed, split, of, role, gain in findings.gains.sides.iter_rows():
            if split == "test" and of == fit:
                self._gains.setdefault((cell, role), {})[seed] = gain
            elif split == "validation" and role == "out_of_domain":
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
        """The cells of a pair where a constant alpha, which `keep` accepts, is all there is."""
        cells = self.arms(pair.student.name, pair.teacher.name)
        return [v for v in cells if v.constant and v.alpha is not None and keep(v.alpha)]

    def pairs(self, *relations: str) -> list[PairFinding]:
        """Pairs with an ordinary teacher, of the given measured relations; default: of all.

        Ordinary is who read the study's text, in another order than its students, and whose whole
        distribution is learned. The others have claims of their own, and would change what a mean is of.
        """
        return [
            pair
            for pair in self.all_pairs()
            if (not relations or pair.relation in relations)
            and (pair.teacher.corpus, pair.teacher.targets) == (None, None)
            and self._seeds(pair) != {pair.teacher.data_seed}
        ]

    def all_pairs(self) -> list[PairFinding]:
        """Pairs with any real teacher and constant alphas."""
        return [pair for pair in self.findings.pairs if not pair.teacher.control and self.constants(pair)]

    def _seeds(self, pair: PairFinding) -> set[int]:
        return {seed for cell in self.constants(pair) for seed in self.gain(cell, "out_of_domain")}

    def best(self, cells: Sequence[Verdict], side: Side) -> Series:
        """Gain of the best of `cells`, which is chosen for each seed by the other seeds.

        Validation and test documents of a run share its training noise, so that a choice by the run's own
        validation gain would flatter it. With one seed there is no other, and its own has to do.
        """
        return self.best_of([[cell] for cell in cells], side)

    def best_of(self, arms: Sequence[Sequence[Verdict]], side: Side) -> Series:
        """The same with arms that are several cells each, of different seeds."""
        gains = [_joined(self.gain(cell, side) for cell in arm) for arm in arms]
        valid = [_joined(self._valid[cell.cell] for cell in arm) for arm in arms]
        found: Series = {}
        for seed in sorted({seed for gain in gains for seed in gain}):
            means = [
                _mean_but(seed, own) if seed in gain else -inf for own, gain in zip(valid, gains, strict=True)
            ]
            found[seed] = gains[means.index(max(means))][seed]
        return found

    def best_alpha(self, cells: Sequence[Verdict]) -> Series:
        """The alpha with the largest validation gain of each seed by itself."""
        seeds = set.intersection(*(set(self._valid[cell.cell]) for cell in cells))
        best = {
            seed: max(cells, key=lambda cell: self._valid[cell.cell][seed]).alpha for seed in sorted(seeds)
        }
        return {seed: alpha for seed, alpha in best.items() if alpha is not None}

    def validation(self, cells: Sequence[Verdict]) -> float:
        """The largest mean validation gain among `cells`."""
        return max(fmean(self._valid[cell.cell].values()) for cell in cells)

    def variants(self, *phrases: str, alpha: float | None = None) -> list[tuple[Verdict, Verdict]]:
        """Cells whose arm says `phrases[0]`, each with the cell that lacks all of `phrases`."""
        found = []
        for cell in self.verdicts:
            if not says(cell.arm, phrases[0]) or (alpha is not None and cell.alpha != alpha):
                continue
            plain = without(cell.arm, *phrases)
            others = self.arms(cell.student, cell.teacher, cell.stage)
            found += [(cell, other) for other in others if other.arm == plain]
        return found

    def change(self, variants: Iterable[tuple[Verdict, Verdict]], side: Side) -> Series:
        """Gain of variants less that of the plain cells, mean over them."""
        return mean_of(minus(self.gain(one, side), self.gain(other, side)) for one, other in variants)

    def runs(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(cell, seed) of a run and the baseline that it is compared with."""
        pairs = self.findings.gains.domains.select("run", "base_run", "cell", "seed").unique()
        return {(run, base): (cell, seed) for run, base, cell, seed in pairs.iter_rows()}

    def scores(self, metric: str, domain: str) -> dict[tuple[int, int], tuple[float, float]]:
        """(score, score of the baseline) of a metric on one domain, by cell and seed; test split or probe."""
        known = self.results.scores.filter(metric=metric, domain=domain)
        values = dict(known.select("run", "value").iter_rows())
        return {
            place: (values[run], values[base])
            for (run, base), place in self.runs().items()
            if run in values and base in values
        }
