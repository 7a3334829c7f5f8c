"""Draw what a planned study could measure if nothing had an effect: noise alone, as often as asked for."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tutelage.analysis.claims.evidence import GainsBySeed
from tutelage.analysis.gains import measure
from tutelage.analysis.verdicts import Findings, PairFinding, Verdict, nominal, relation
from tutelage.study.results import PLANNED, Results
from tutelage.study.token_tables import TokenComparison

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from tutelage.analysis.claims.noise import Noise, NoiseParts
    from tutelage.analysis.gains import Fit
    from tutelage.study.plan import Plan, PlanRun, PlanStudent, PlanTeacher


class PlannedStudy:
    """A planned study without effects, drawn again and again."""

    def __init__(self, plan: Plan, noise: Noise) -> None:
        taken = {text for teacher in plan.teachers for text in teacher.texts}
        outside = [domain for domain in plan.domains if domain.role == "out_of_domain"]
        own = [domain for domain in outside if domain.name not in taken] or outside
        inside = [domain for domain in plan.domains if domain.name == plan.in_domain]
        self._plan = plan.model_copy(update={"domains": (*inside, own[0])})  # others would be as noisy
        self._text = own[0].name
        self._noise = noise
        self._rng = np.random.default_rng(0)
        rows = [attrgetter(*PLANNED)(run) for run in plan.runs]
        self._runs = pl.DataFrame(rows, PLANNED, orient="row").with_columns(status=pl.lit("done"))
        self._pairs = tuple(_pairs(plan, noise.strength))
        once = {teacher.name: teacher.run for teacher in plan.teachers}
        self._shares = [_Shares.of(run, once) for run in plan.runs]

    def studies(self, draws: int, fits: Collection[Fit]) -> Iterator[dict[Fit, GainsBySeed]]:
        """Gains by seed of `draws` studies, with each of `fits`."""
        verdicts: tuple[Verdict, ...] | None = None
        for _ in range(draws):
            results = self._results()
            gains = measure(results)
            if verdicts is None:
                verdicts = tuple(_verdicts(self._plan, gains.cells, self._pairs))
            findings = Findings(gains, verdicts, self._pairs, pl.DataFrame(), pl.DataFrame())
            yield {fit: GainsBySeed(results, findings, fit) for fit in fits}

    def _results(self) -> Results:
        inside, outside = self._two_sides()
        fitted, after = self._deviations(self._noise.fitted), self._deviations(self._noise.after)
        later = np.array([run.kind == "after" for run in self._plan.runs])
        outside = np.where(later, after, outside)
        text, own = self._text, self._plan.in_domain
        columns = [
            (own, "bits_per_byte", "test", 1 + inside / 100),
            (own, "ece", "test", 2 ** self._deviations(self._noise.calibration)),
            (text, "bits_per_byte", "test", 1 + outside / 100),
            (text, "bits_per_byte", "validation", 1 + outside / 100),
            (text, "bits_per_byte_unigram", "test", 1 + fitted / 100),
        ]
        scores = pl.concat(
            self._runs.select("run").with_columns(
                domain=pl.lit(domain), split=pl.lit(split), metric=pl.lit(metric), value=pl.Series(values)
            )
            for domain, metric, split, values in columns
        ).with_columns(version=pl.lit("drawn"))
        return Results(
            plan=self._plan,
            runs=self._runs,
            scores=scores,
            documents=pl.DataFrame(),
            curves=pl.DataFrame(),
            provenance={},
            token_comparisons=tuple(self._comparisons()),
            problems=(),
        )

    def _two_sides(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Deviations in and out of domain, which go together."""
        first, second = self._standard(), self._standard()
        together = self._noise.together.model_dump()
        outside = {
            name: together[name] * first[name] + sqrt(1 - together[name] ** 2) * second[name]
            for name in first
        }
        return self._sum(self._noise.in_domain, first), self._sum(self._noise.out_of_domain, outside)

    def _deviations(self, parts: NoiseParts) -> NDArray[np.float64]:
        return self._sum(parts, self._standard())

    def _standard(self) -> dict[str, NDArray[np.float64]]:
        """Standard normal numbers of every run, by source; those of one teacher are the same."""
        taught = {name for share in self._shares if (name := share.teacher) is not None}
        teachers = dict(zip(sorted(taught), self._rng.normal(size=len(taught)), strict=True))
        own = self._rng.normal(size=len(self._shares))
        shared = np.array([teachers.get(share.teacher or "", 0.0) for share in self._shares])
        return {"untaught": own, "mixed": own, "alone": own, "teacher": shared}

    def _sum(self, parts: NoiseParts, standard: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        sizes = parts.model_dump()
        own = np.array([sizes[share.source] for share in self._shares])
        sources = np.stack([standard[share.source][i] for i, share in enumerate(self._shares)])
        total: NDArray[np.float64] = own * sources + parts.teacher * standard["teacher"]
        return total

    def _comparisons(self) -> Iterator[TokenComparison]:
        """Token comparisons of one taught student of every seed, as if somebody had made them."""
        plan = self._plan
        taught = [run for run in plan.runs if run.kind == "student" and run.teacher is not None]
        baselines = [run for run in plan.runs if run.kind == "baseline"]
        for run in taught:
            first = taught[0]
            same = (run.student, run.teacher, run.arm) == (first.student, first.teacher, first.arm)
            sorters = [
                one.run
                for one in baselines
                if one.student == run.student and one.twin == 0 and one.run != run.baseline
            ]
            if same and run.baseline is not None and sorters:
                groups = pl.DataFrame(
                    {
                        "quantity": ["gain"],
                        "of": ["student"],
                        "grouping": ["entropy contrast"],
                        "mean": [self._noise.tokens * self._rng.normal()],
                    }
                )
                yield TokenComparison(
                    run.run, str(run.teacher), run.baseline, sorters[0], plan.in_domain, 1, 1, 1, groups
                )


@dataclass(frozen=True, slots=True)
class _Shares:
    """Where the noise of a run comes from.

    Attributes:
        source: field of `NoiseParts` with its own noise.
        teacher: run of its teacher, where the study trains one.
    """

    source: str
    teacher: str | None

    @classmethod
    def of(cls, run: PlanRun, once: Mapping[str, str | None]) -> _Shares:
        if run.teacher is None or run.kind in {"baseline", "teacher"}:
            return cls("untaught", None)
        return cls("alone" if run.alpha == 1 else "mixed", run.teacher_run or once[run.teacher])


def _pairs(plan: Plan, strength: float) -> Iterator[PairFinding]:
    """Every pair, with the bits per byte that its teacher's parameters and tokens let expect."""
    taught = {(run.student, run.teacher) for run in plan.runs if run.kind == "student"}
    for student in plan.students:
        for teacher in plan.teachers:
            if (student.name, teacher.name) in taught:
                bits = _expected_bits(student, teacher, strength)
                yield PairFinding(
                    student=student,
                    teacher=teacher,
                    bits_per_byte=bits,
                    student_bits=1.0,
                    relation=None if bits is None else relation(bits, 1.0),
                    nominal=nominal(teacher, student),
                    best=None,
                    flat=(),
                )


def _expected_bits(student: PlanStudent, teacher: PlanTeacher, strength: float) -> float | None:
    """Bits per byte of a teacher where the untaught student has 1."""
    if teacher.parameters is None or teacher.tokens is None:
        return None
    doublings = log2(teacher.parameters * teacher.tokens / (student.parameters * student.tokens))
    return 1 - strength * doublings / 100


def _verdicts(plan: Plan, cells: pl.DataFrame, pairs: Sequence[PairFinding]) -> Iterator[Verdict]:
    """The cells, without numbers."""
    settings = {run.arm: run.arm_settings for run in plan.runs}
    relations = {(pair.student.name, pair.teacher.name): pair.relation for pair in pairs}
    for row in cells.iter_rows(named=True):
        yield Verdict(
            **row,
            arm_settings=settings[row["arm"]] or {},
            relation=relations.get((row["student"], row["teacher"])),
            gains={},
            noise={},
            texts={},
            n_seeds=0,
            n_teachers=0,
        )
