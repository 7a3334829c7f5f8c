"""Judge whether each teacher helps each student: gains over the no-teacher student, with intervals.

Choices use the validation split, reports the test split.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from tutelage.analysis.gains import Fit, Gains, Side, document_noise, measure, text_spreads
from tutelage.analysis.stats import Estimate, TextSpread, flat_region
from tutelage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.study.plan import Plan, PlanStudent, PlanTeacher
    from tutelage.study.results import Results

Relation = Literal["weak-to-strong", "same-level", "strong-to-weak"]

SAME_LEVEL_MARGIN = 0.01
"""Teacher and student are on the same level if their bits per byte differ by at most this fraction."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one teacher, used in one way, did to one student, on the test split.

    Attributes:
        cell: its number in `Gains.cells`.
        student: name of the student setting.
        teacher: name; None for a student without one that has an arm of its own.
        arm: what is done with the teacher, in words.
        arm_settings: the same as settings; see `RunLabels`.
        stage: post-training stage after which this was measured; None: after pretraining.
        alpha: weight of the distillation loss where it is one number.
        constant: whether the arm is that number alone.
        control: whether it is a control, without knowledge of context.
        relation: of teacher and student as measured; None where it was not, and of controls.
        gains: percent by fit and role, with intervals over seeds, which of one seed have no ends: a single
            run says nothing of how another would have come out.
        noise: the same with intervals over documents: evaluation noise only.
        texts: how much the out-of-domain gain depends on which texts it is over, by fit; empty with one text.
        n_seeds: paired seeds behind the gains.
        n_teachers: trained teachers behind them: as many as seeds, or one for all; 0 where the study trained
            none.
    """

    cell: int
    student: str
    teacher: str | None
    arm: str
    arm_settings: Mapping[str, Any]
    stage: str | None
    alpha: float | None
    constant: bool
    control: bool
    relation: Relation | None
    gains: Mapping[tuple[Fit, Side], Estimate]
    noise: Mapping[tuple[Fit, Side], Estimate]
    texts: Mapping[Fit, TextSpread]
    n_seeds: int
    n_teachers: int

    @property
    def in_domain(self) -> Estimate:
        """Raw gain on the training distribution."""
        return self.gains["raw", "in_domain"]

    @property
    def out_of_domain(self) -> Estimate:
        """Raw gain, mean over the other domains."""
        return self.gains["raw", "out_of_domain"]

    @property
    def fitted(self) -> Estimate | None:
        """Out-of-domain gain with temperature and unigram mixture fitted; None where they were not."""
        return self.gains.get(("unigram", "out_of_domain"))

    @property
    def judged(self) -> bool:
        """Whether it may be worded as an effect: one seed is shown, not judged."""
        return self.n_seeds > 1


@dataclass(frozen=True, slots=True)
class PairFinding:
    """One student and one teacher: how good the teacher is beside the student, and its best result.

    Attributes:
        student: from the plan.
        teacher: from the plan.
        bits_per_byte: of the teacher, in domain, on the validation split; None if it was not scored.
        student_bits: of the same student without a teacher, mean over seeds; None if not scored.
        relation: measured by the two; None if one is missing.
        nominal: the pair by parameters and tokens; None where the teacher's are not known.
        best: verdict at the alpha with the largest out-of-domain gain on the validation split; None if no
            student of this teacher is finished, or none is scored on such text.
        flat: alphas that cannot be told from the best on the validation split, best included; none where
            there is one seed, which tells nothing apart.
    """

    student: PlanStudent
    teacher: PlanTeacher
    bits_per_byte: float | None
    student_bits: float | None
    relation: Relation | None
    nominal: Relation | Literal["mixed"] | None
    best: Verdict | None
    flat: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Findings:
    """Every answer of a study.

    Attributes:
        gains: the tables behind it.
        verdicts: in the order of `Gains.cells`: by student, stage, teacher; rising alphas before other arms.
        pairs: student settings with each of their teachers, in the plan's order.
        domains: cell, student, teacher, arm, stage, domain, role, fit, gain (percent, mean over seeds, test
            split), n_seeds; the training distribution comes first.
        baseline: student, domain, bits_per_byte (mean over runs) of the no-teacher student, test split.
    """

    gains: Gains
    verdicts: tuple[Verdict, ...]
    pairs: tuple[PairFinding, ...]
    domains: pl.DataFrame
    baseline: pl.DataFrame


def judge(results: Results) -> Findings:
    """Turn result files into answers.

    Raises:
        UserError: no student is finished, or none has a finished no-teacher run of its seed beside it.
    """
    gains = measure(results)
    if gains.domains.is_empty():
        raise UserError(f"study {results.plan.name}: {_why_empty(results)}")
    relations = _relations(results)
    verdicts = _verdicts(results, gains, relations)
    return Findings(
        gains=gains,
        verdicts=verdicts,
        pairs=_pairs(results, gains, verdicts, relations),
        domains=_domain_table(results, gains),
        baseline=_baseline(results),
    )


def _why_empty(results: Results) -> str:
    usable = results.runs.filter(pl.col("run").is_in(results.scores["run"].implode()))
    if usable.filter(kind="student").is_empty():
        reason = "no student run is finished and scored, so there is nothing to report yet"
    else:
        reason = "no finished student has a finished no-teacher run of the same seed to compare with"
    return "; ".join((reason, *results.problems[:1]))


@dataclass(frozen=True, slots=True)
class _Bits:
    """Bits per byte in domain, validation split: of teachers by student and name, of untaught students."""

    teachers: Mapping[tuple[str, str], float]
    students: Mapping[str, float]

    def relation(self, teacher: str | None, student: str) -> Relation | None:
        own, alone = self.teachers.get((student, str(teacher))), self.students.get(student)
        return None if own is None or alone is None else relation(own, alone)


def _relations(results: Results) -> _Bits:
    scores = results.scores.filter(metric="bits_per_byte", split="validation", domain=results.plan.in_domain)
    value = pl.col("value").mean()
    # Several teachers may go by one run, with different targets, and one by several runs, those of a chain by
    # students.
    learned = results.runs.select("student", "teacher", run="teacher_run").drop_nulls().unique()
    own = learned.join(scores, on="run").group_by("student", "teacher").agg(value)
    alone = results.runs.filter(kind="baseline").join(scores, on="run").group_by("student").agg(value)
    return _Bits({(student, name): bits for student, name, bits in own.iter_rows()}, dict(alone.iter_rows()))


def _verdicts(results: Results, gains: Gains, bits: _Bits) -> tuple[Verdict, ...]:
    seeds = _estimates(gains.estimates.filter(split="test").with_columns(n=pl.col("n").cast(pl.Int64)))
    noise = _estimates(document_noise(results, gains))
    learned = gains.domains.group_by("cell").agg(pl.col("teacher_run").drop_nulls().n_unique())
    teachers = dict(learned.iter_rows())
    means = _teachers_of_means(results.plan)
    texts = text_spreads(gains)
    settings = {run.arm: run.arm_settings for run in results.plan.runs}
    found = []
    for row in gains.cells.iter_rows(named=True):
        own, documents = seeds[row["cell"]], noise.get(row["cell"], {})
        n_seeds = max(estimate.n for estimate in own.values())
        learned_of = means.get(str(row["teacher"]))
        found.append(
            Verdict(
                **row,
                arm_settings=settings[row["arm"]] or {},
                relation=bits.relation(row["teacher"], row["student"]),
                gains=own,
                noise=documents,
                texts=texts.get(row["cell"], {}),
                n_seeds=n_seeds,
                n_teachers=teachers[row["cell"]] if learned_of is None else min(n_seeds, learned_of),
            )
        )
    return tuple(found)


def _teachers_of_means(plan: Plan) -> dict[str, int]:
    """How often the study trained each teacher that a mean is of, by name of the mean; the most of them."""
    trained = Counter(run.teacher for run in plan.runs if run.kind == "teacher")
    return {mean.name: max(trained[one] for one in mean.of) for mean in plan.teachers if mean.of}


def _estimates(table: pl.DataFrame) -> dict[int, dict[tuple[Fit, Side], Estimate]]:
    found: dict[int, dict[tuple[Fit, Side], Estimate]] = {}
    columns = table.select("cell", "fit", "role", "gain", "low", "high", "n")
    ends = pl.col("low").fill_null(-inf), pl.col("high").fill_null(inf)
    for cell, fit, role, *numbers in columns.with_columns(*ends).iter_rows():
        found.setdefault(cell, {})[fit, role] = Estimate(*numbers)
    return found


def _pairs(
    results: Results, gains: Gains, verdicts: Sequence[Verdict], known: _Bits
) -> tuple[PairFinding, ...]:
    planned = results.runs.filter(kind="student").select("student", "teacher").drop_nulls()
    wanted = set(planned.unique().rows())
    chosen = _best_cells(gains)
    by_cell = {verdict.cell: verdict for verdict in verdicts}
    found = []
    for student in results.plan.students:
        for teacher in results.plan.teachers:
            if (student.name, teacher.name) not in wanted:
                continue
            best, flat = chosen.get((student.name, teacher.name), (None, ()))
            found.append(
                PairFinding(
                    student=student,
                    teacher=teacher,
                    bits_per_byte=known.teachers.get((student.name, teacher.name)),
                    student_bits=known.students.get(student.name),
                    relation=known.relation(teacher.name, student.name),
                    nominal=nominal(teacher, student),
                    best=None if best is None else by_cell[best],
                    flat=flat,
                )
            )
    return tuple(found)


def relation(teacher: float, student: float) -> Relation:
    """Name the pair by its in-domain validation bits per byte, teacher against no-teacher student."""
    if abs(teacher / student - 1) <= SAME_LEVEL_MARGIN:
        return "same-level"
    return "strong-to-weak" if teacher < student else "weak-to-strong"


def nominal(teacher: PlanTeacher, student: PlanStudent) -> Relation | Literal["mixed"] | None:
    """Name the pair by parameters and tokens: mixed if one says stronger and the other weaker."""
    if teacher.parameters is None or teacher.tokens is None:
        return None
    signs = {
        (ours > theirs) - (ours < theirs)
        for ours, theirs in (
            (teacher.parameters, student.parameters),
            (teacher.tokens, student.tokens),
        )
    }
    if signs == {0}:
        return "same-level"
    if {-1, 1} <= signs:
        return "mixed"
    return "strong-to-weak" if 1 in signs else "weak-to-strong"


def _best_cells(gains: Gains) -> dict[tuple[str, str], tuple[int, tuple[float, ...]]]:
    """Cell of the best constant alpha of each pair and the alphas as good; the smaller of two equals.

    Chosen by the mean out-of-domain gain on the validation split. A pair without constants has its best arm.
    One with one seed is best only where no other has more: it is shown, not judged.
    """
    valid = gains.sides.filter(split="validation", role="out_of_domain", fit="raw")
    cells = gains.cells.filter(pl.col("stage").is_null(), pl.col("teacher").is_not_null())
    rows = valid.join(cells.drop("stage"), on="cell")
    found = {}
    for (student, teacher), pair in rows.partition_by("student", "teacher", as_dict=True).items():
        constants = pair.filter("constant")
        some = pair if constants.is_empty() else constants
        several = some.filter(pl.len().over("cell") > 1)
        some = some if several.is_empty() else several
        means = some.group_by("cell", "alpha").agg(pl.col("gain").mean()).sort("cell")
        best = int(means["cell"][means["gain"].arg_max() or 0])
        table = some.pivot("cell", index="seed", values="gain", sort_columns=True).drop("seed").drop_nulls()
        places = [int(name) for name in table.columns]
        flat = flat_region(table.to_numpy(), places.index(best)) if table.height > 1 else []
        alphas = dict(means.select("cell", "alpha").iter_rows())
        region = [] if constants.is_empty() else [alphas[places[i]] for i in flat]
        found[str(student), str(teacher)] = best, tuple(sorted(a for a in region if a is not None))
    return found


def _domain_table(results: Results, gains: Gains) -> pl.DataFrame:
    inside_first = sorted(results.plan.domains, key=lambda domain: domain.role)
    rank = {domain.name: i for i, domain in enumerate(inside_first)}
    return (
        gains.domains.filter(split="test")
        .group_by("cell", "domain", "role", "fit")
        .agg(pl.col("gain").mean(), n_seeds=pl.len())
        .join(gains.cells.select("cell", "student", "teacher", "arm", "stage"), on="cell")
        .sort("cell", pl.col("domain").replace_strict(rank), "fit")
        .select("cell", "student", "teacher", "arm", "stage", "domain", "role", "fit", "gain", "n_seeds")
    )


def _baseline(results: Results) -> pl.DataFrame:
    return (
        results.runs.filter(kind="baseline")
        .join(results.scores.filter(metric="bits_per_byte", split="test"), on="run")
        .group_by("student", "domain")
        .agg(bits_per_byte=pl.col("value").mean())
        .sort("student", "domain")
    )
