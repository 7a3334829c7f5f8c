"""Measure the noise of gains in a finished study by its sources, or read what came with the package.

Runs of one seed share their batches, so whatever those do cancels in a gain. What is left has three sources:
the untaught runs that a gain is taken over, which all gains of a seed share; the teacher, which all its
students of a seed share where each seed has a teacher of its own; and the taught run itself. They are told
apart by moments. The first is the variance between the untaught runs of a seed or, where there is one, the
covariance over seeds of gains from different teachers; gains from one teacher share what that adds too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from importlib import resources
from itertools import product
from math import ceil, inf, log2, sqrt
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from pydantic import Field

from tutelage.analysis.claims.objective_tests import difficulty
from tutelage.analysis.gains import twins_of
from tutelage.errors import UserError
from tutelage.records import Record, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tutelage.analysis.claims.evidence import GainsBySeed, Series
    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import Verdict

KINDS = ("in_domain", "out_of_domain", "fitted", "after", "calibration")
"""Kinds of gain: the fields of `Noise` with parts of their own."""
_TWO = 2
_DIGITS = 4
_MOST_ARMS = 40
"""Arms of a student whose gains are held against each other; more of them tell little more, and take long."""
_UNTOLD = 4
"""Degrees of freedom at which half of a variance is split over its sources by moments, half equally: with few
seeds moments alone would call a source silent, or a third one all there is."""


class NoiseParts(Record):
    """What three sources of noise add, as a standard deviation over seeds each, or a correlation each."""

    untaught: float = Field(description="of one untaught run")
    teacher: float = Field(description="of training the teacher again")
    mixed: float = Field(description="of one taught run, alpha below 1")
    alone: float = Field(description="of one taught run at alpha 1")


class Noise(Record):
    """How much numbers differ over the seeds of a study in which nothing else differs."""

    study: str = Field(description="study that it was measured in, and where that is")
    seeds: int = Field(description="seeds of that study")
    in_domain: NoiseParts = Field(description="gain in domain, percent")
    out_of_domain: NoiseParts = Field(description="gain out of domain, percent")
    fitted: NoiseParts = Field(description="gain out of domain, calibration fitted, percent")
    after: NoiseParts = Field(description="gain out of domain after post-training, percent")
    calibration: NoiseParts = Field(description="calibration error over the untaught student's, doublings")
    together: NoiseParts = Field(description="correlation of the gains in and out of domain")
    tokens: float = Field(
        description="gain on the hardest fifth of tokens less that on the easiest, nats, of one student"
    )
    strength: float = Field(
        description="percent fewer bits per byte of a teacher per doubling of its parameters times tokens"
    )

    def of(self, kind: str) -> NoiseParts:
        """The parts of one of `KINDS`."""
        return {
            "in_domain": self.in_domain,
            "out_of_domain": self.out_of_domain,
            "fitted": self.fitted,
            "after": self.after,
            "calibration": self.calibration,
        }[kind]

    def gain(self, kind: str, twins: int, *, alone: bool = False) -> float:
        """Standard deviation over seeds of one gain.

        Args:
            kind: one of `KINDS`.
            twins: untaught runs of each seed.
            alone: whether alpha is 1.
        """
        parts = self.of(kind)
        own = parts.alone if alone else parts.mixed
        return sqrt(parts.untaught**2 / twins + parts.teacher**2 + own**2)


def default_noise() -> Noise:
    """The noise that came with the package, and names the study that it was measured in."""
    text = resources.files("tutelage.presets").joinpath("noise.json").read_text(encoding="utf-8")
    return Noise.model_validate(parse_json(text))


def measure_noise(study: JudgedStudy) -> Noise:
    """Measure the noise of a finished study; what its runs cannot tell is as in `default_noise`.

    Raises:
        UserError: no arm has two seeds.
    """
    plan, raw = study.results.plan, study.by_fit["raw"]
    twins = 1 + max(run.twin for run in plan.runs)
    known = _numbers(study)
    if not any(len(series) >= _TWO for series in known["out_of_domain"].gains.values()):
        raise UserError(
            f"study {plan.name}: no arm has two seeds, which noise is measured over; name another study"
        )
    cells = {verdict.cell: verdict for verdict in raw.verdicts}
    found = default_noise()
    changes: dict[str, object] = {
        kind: _deviations(_moments(cells, numbers, numbers, twins))
        for kind, numbers in known.items()
        if any(len(series) >= _TWO for series in numbers.gains.values())
    }
    changes["together"] = _correlations(
        *(_moments(cells, known[a], known[b], twins) for a, b in _ALIKE_AND_CROSSED)
    )
    contrasts = [
        series for test in difficulty(raw) for series in test.members.values() if len(series) >= _TWO
    ]
    if contrasts:
        variances = [float(np.var([*one.values()], ddof=1)) for one in contrasts]
        changes["tokens"] = round(sqrt(fmean(variances)), _DIGITS)
    strength = _strength(raw)
    if strength is not None:
        changes["strength"] = strength
    return found.model_copy(update=changes | {"study": plan.name, "seeds": len(plan.seeds)})


_ALIKE_AND_CROSSED = (
    ("in_domain", "out_of_domain"),
    ("in_domain", "in_domain"),
    ("out_of_domain", "out_of_domain"),
)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What differs over seeds, of one kind of gain.

    Attributes:
        gains: one number per seed, by cell.
        untaught: of each seed's untaught runs the logarithms of their scores, in the units of the gains.
    """

    gains: dict[int, Series]
    untaught: dict[str, list[float]]


def _numbers(study: JudgedStudy) -> dict[str, _Numbers]:
    """What differs over seeds, by kind of gain."""
    raw, fitted = study.by_fit["raw"], study.by_fit.get("unigram", study.by_fit["raw"])
    first = {v.cell: v for v in raw.verdicts if v.stage is None}
    later = {v.cell: v for v in raw.verdicts if v.stage is not None}
    doublings: dict[int, Series] = {}
    for (cell, seed), (own, bases) in raw.scores("ece", study.results.plan.in_domain).items():
        if cell in first and min(own, *bases) > 0:
            doublings.setdefault(cell, {})[seed] = fmean(log2(own / base) for base in bases)
    outside = {cell: raw.gain(verdict, "out_of_domain") for cell, verdict in first.items()}
    return {
        "in_domain": _Numbers(
            {cell: raw.gain(verdict, "in_domain") for cell, verdict in first.items()},
            _untaught(study, "bits_per_byte", "in_domain"),
        ),
        "out_of_domain": _Numbers(outside, _untaught(study, "bits_per_byte", "out_of_domain")),
        "fitted": _Numbers(
            {} if fitted is raw else {cell: fitted.gain(v, "out_of_domain") for cell, v in first.items()},
            _untaught(study, "bits_per_byte_unigram", "out_of_domain"),
        ),
        "after": _Numbers(
            {cell: raw.gain(verdict, "out_of_domain") for cell, verdict in later.items()},
            _untaught(study, "bits_per_byte", "out_of_domain", later=True),
        ),
        "calibration": _Numbers(doublings, _untaught(study, "ece", "in_domain")),
    }


def _untaught(study: JudgedStudy, metric: str, role: Side, *, later: bool = False) -> dict[str, list[float]]:
    """Logarithms of the test scores of each seed's untaught runs, in percent, or of errors in doublings."""
    results = study.results
    texts = [domain.name for domain in results.plan.domains if domain.role == role]
    stage = pl.col("stage").is_not_null() if later else pl.col("stage").is_null()
    value = pl.col("value").log(2) if metric == "ece" else pl.col("value").log() * 100
    rows = (
        results.scores.filter(pl.col("domain").is_in(texts), pl.col("value") > 0, metric=metric, split="test")
        .group_by("run")
        .agg(value.mean())
        .join(results.runs.filter(stage).select("run"), on="run")
        .join(twins_of(results), on="run")
        .sort("base_run", "run")
    )
    found: dict[str, list[float]] = {}
    for base, number in rows.select("base_run", "value").iter_rows():
        found.setdefault(base, []).append(number)
    return {base: numbers for base, numbers in found.items() if len(numbers) >= _TWO}


@dataclass(frozen=True, slots=True)
class _Moments:
    """Variances, or covariances, of what three sources of noise add."""

    untaught: float
    teacher: float
    mixed: float
    alone: float


def _moments(cells: Mapping[int, Verdict], first: _Numbers, second: _Numbers, twins: int) -> _Moments:
    """Split the covariance of two kinds of gain over its sources; a kind with itself: its variance.

    Where all gains are one teacher's, what it adds is counted as the untaught runs'; where there is one arm,
    its untaught run is taken to be as noisy as the taught one. With few seeds the split is drawn to equality.
    """
    pairs: defaultdict[bool, list[float]] = defaultdict(list)
    own: defaultdict[bool, list[tuple[float, bool]]] = defaultdict(list)
    for cell, other in _beside(cells, first.gains):
        covariance = _covariance(first.gains[cell], second.gains.get(other, {}))
        if covariance is None:
            continue
        one = cells[cell]
        if cell == other:
            own[one.alpha == 1].append((covariance, one.n_teachers > 1))
        else:
            pairs[one.teacher == cells[other].teacher and one.n_teachers > 1].append(covariance)
    least = 0.0 if first is second else -inf  # a variance that comes out below 0 by chance is 0
    everything = [variance for some in own.values() for variance, _ in some]
    between = [
        float(np.cov(numbers, second.untaught[base])[0, 1])
        for base, numbers in first.untaught.items()
        if len(numbers) == len(second.untaught.get(base, ()))
    ]
    if between:
        shared = fmean(between) / twins
    elif pairs[False] or pairs[True]:
        shared = max(least, fmean(pairs[False] or pairs[True]))
    else:
        shared = fmean(everything) / (1 + twins) if everything else 0.0
    teacher = max(least, fmean(pairs[True]) - shared) if pairs[True] else 0.0
    whole, taught = fmean(everything or [0.0]), any(each for some in own.values() for _, each in some)
    known = 1 - _UNTOLD / (_UNTOLD + max(0, max(map(len, first.gains.values()), default=0) - 1))
    equal = (1 - known) / (2 + taught) if first is second else 0.0  # few seeds tell no correlation
    left = {
        alone: known * max(least, fmean(variance - shared - teacher * each for variance, each in some))
        + equal * fmean(variance for variance, _ in some)
        for alone, some in own.items()
    }
    either = fmean(left.values()) if left else 0.0
    return _Moments(
        twins * (known * shared + equal * whole),
        known * teacher + equal * whole * taught,
        left.get(False, either),
        left.get(True, either),
    )


def _beside(cells: Mapping[int, Verdict], some: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pairs of cells of one student and stage, each with itself too; of many cells evenly spaced ones."""
    groups: defaultdict[tuple[str, str | None], list[int]] = defaultdict(list)
    for cell in some:
        groups[cells[cell].student, cells[cell].stage].append(cell)
    for own in groups.values():
        spaced = own[:: ceil(len(own) / _MOST_ARMS)]
        yield from product(spaced, spaced)


def _covariance(first: Series, second: Series) -> float | None:
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < _TWO:
        return None
    return float(np.cov([first[seed] for seed in seeds], [second[seed] for seed in seeds])[0, 1])


def _deviations(found: _Moments) -> NoiseParts:
    parts = (found.untaught, found.teacher, found.mixed, found.alone)
    return _parts(*(sqrt(max(0.0, variance)) for variance in parts))


def _correlations(crossed: _Moments, first: _Moments, second: _Moments) -> NoiseParts:
    return _parts(
        *(
            max(-1.0, min(1.0, covariance / sqrt(one * other))) if min(one, other) > 0 else 0.0
            for covariance, one, other in (
                (crossed.untaught, first.untaught, second.untaught),
                (crossed.teacher, first.teacher, second.teacher),
                (crossed.mixed, first.mixed, second.mixed),
                (crossed.alone, first.alone, second.alone),
            )
        )
    )


def _parts(untaught: float, teacher: float, mixed: float, alone: float) -> NoiseParts:
    return NoiseParts(
        untaught=round(untaught, _DIGITS),
        teacher=round(teacher, _DIGITS),
        mixed=round(mixed, _DIGITS),
        alone=round(alone, _DIGITS),
    )


def _strength(study: GainsBySeed) -> float | None:
    """Median over ordinary teachers of what doubling parameters times tokens is worth; None without one."""
    found = []
    for pair in study.pairs():
        teacher, student = pair.teacher, pair.student
        if teacher.parameters is None or teacher.tokens is None or pair.relation is None:
            continue
        doublings = log2(teacher.parameters * teacher.tokens / (student.parameters * student.tokens))
        if abs(doublings) > 0.5 and pair.bits_per_byte and pair.student_bits:  # noqa: PLR2004 - near 0 it tells nothing
            found.append(100 * (1 - pair.bits_per_byte / pair.student_bits) / doublings)
    return round(median(found), _DIGITS) if found else None
