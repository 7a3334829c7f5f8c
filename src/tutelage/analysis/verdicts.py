"""Does this teacher help this student? Gains over the no-teacher student, with intervals.

A gain is in percent of the no-teacher bits per byte of the same seed; positive is better (fewer bits).
The out-of-domain gain is the mean of the domains' gains. Choices use the validation split, reports the
test split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import polars as pl

from tutelage.analysis.stats import Estimate, paired_document_bootstrap, t_interval
from tutelage.errors import UserError

if TYPE_CHECKING:
    from tutelage.study.planfile import PlanTeacher
    from tutelage.study.results import Results
    from tutelage.types import Split

Interval = Literal["seeds", "documents"]
Relation = Literal["weak-to-strong", "same-level", "strong-to-weak"]

SAME_LEVEL_MARGIN = 0.01
"""Teacher and student are on the same level if their bits per byte differ by at most this fraction."""

_BASELINE = pl.col("kind") == "baseline"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one teacher at one alpha did to the student, on the test split.

    Attributes:
        teacher: name.
        control: whether it is a control, without knowledge of context.
        alpha: weight of the distillation loss.
        in_domain: gain in percent on the training distribution.
        out_of_domain: gain in percent, mean over the other domains.
        interval: "seeds": paired t interval over seeds; "documents": paired bootstrap over the scored
            documents, which leaves out training noise.
        n_seeds: paired seeds behind the gains.
    """

    teacher: str
    control: bool
    alpha: float
    in_domain: Estimate
    out_of_domain: Estimate
    interval: Interval
    n_seeds: int


@dataclass(frozen=True, slots=True)
class TeacherFinding:
    """One teacher: how good it is itself, and its best result.

    Attributes:
        teacher: from the plan.
        bits_per_byte: its own, in domain, on the validation split; None if it was not scored.
        relation: measured by `bits_per_byte` against the no-teacher student; None if not scored.
        best: verdict at the alpha with the largest out-of-domain gain on the validation split; None
            if no student of this teacher is finished.
    """

    teacher: PlanTeacher
    bits_per_byte: float | None
    relation: Relation | None
    best: Verdict | None


@dataclass(frozen=True, eq=False)
class Findings:
    """Every answer of a study.

    Attributes:
        student_bits_per_byte: of the no-teacher student, in domain, validation, mean over seeds.
        verdicts: by teacher in the plan's order, then by rising alpha.
        teachers: in the plan's order.
        domains: teacher, control, alpha, domain, role, gain (percent, mean over seeds, test split),
            n_seeds; the training distribution comes first.
        baseline: domain, bits_per_byte of the no-teacher student (test split, mean over seeds).
    """

    student_bits_per_byte: float
    verdicts: tuple[Verdict, ...]
    teachers: tuple[TeacherFinding, ...]
    domains: pl.DataFrame
    baseline: pl.DataFrame


def judge(results: Results) -> Findings:
    """Turn result files into answers.

    Raises:
        UserError: no student is finished, or none has a finished no-teacher run of its seed beside it.
    """
    gains = _gains(results)
    if gains.is_empty():
        raise UserError(f"study {results.plan.name}: {_why_empty(results)}")
    verdicts = tuple(
        _verdict(results, teacher, alpha, gains.filter(teacher=teacher.name, alpha=alpha, split="test"))
        for teacher in results.plan.teachers
        for alpha in gains.filter(teacher=teacher.name)["alpha"].unique().sort()
    )
    student = float(_in_domain(results, _BASELINE)["bits_per_byte"].item())
    return Findings(
        student_bits_per_byte=student,
        verdicts=verdicts,
        teachers=tuple(_finding(results, t, student, gains, verdicts) for t in results.plan.teachers),
        domains=_domain_table(results, gains),
        baseline=_own_bits(results, _BASELINE, "test"),
    )


def _gains(results: Results) -> pl.DataFrame:
    """One row per finished student, domain and split that has a baseline of its seed."""
    scored = _scored(results)
    base = scored.filter(kind="baseline").select(
        "seed", "domain", "split", base_run="run", base_value="value"
    )
    return (
        scored.filter(kind="student")
        .join(base, on=["seed", "domain", "split"])
        .with_columns(gain=100 * (1 - pl.col("value") / pl.col("base_value")))
        .sort("teacher", "alpha", "seed", "split", "domain")
    )


def _scored(results: Results) -> pl.DataFrame:
    """Bits per byte of done runs with what the plan says of run and domain."""
    roles = pl.DataFrame({d.name: d.role for d in results.plan.domains}).unpivot(
        variable_name="domain", value_name="role"
    )
    bits = results.scores.filter(metric="bits_per_byte").join(roles, on="domain")
    return results.runs.join(bits, on="run")


def _why_empty(results: Results) -> str:
    usable = results.runs.filter(pl.col("run").is_in(results.scores["run"].implode()))
    if usable.filter(kind="student").is_empty():
        reason = "no student run is finished and scored, so there is nothing to report yet"
    else:
        reason = "no finished student has a finished no-teacher run of the same seed to compare with"
    return "; ".join((reason, *results.problems[:1]))


def _verdict(results: Results, teacher: PlanTeacher, alpha: float, cell: pl.DataFrame) -> Verdict:
    n_seeds = cell["seed"].n_unique()
    return Verdict(
        teacher=teacher.name,
        control=teacher.control,
        alpha=alpha,
        in_domain=_estimate(results, cell.filter(role="in_domain")),
        out_of_domain=_estimate(results, cell.filter(role="out_of_domain")),
        interval="seeds" if n_seeds > 1 else "documents",
        n_seeds=n_seeds,
    )


def _estimate(results: Results, cell: pl.DataFrame) -> Estimate:
    """Over seeds where there are several, else over documents; `cell` holds the domains of one role."""
    per_seed = cell.group_by("seed", maintain_order=True).agg(pl.col("gain").mean())["gain"]
    if len(per_seed) > 1:
        return t_interval(per_seed.to_numpy())
    runs = cell.select("base_run", "run").row(0)
    documents = results.documents.filter(split="test").sort("domain", "document")
    pairs = []
    for domain in cell["domain"]:
        base, run = (documents.filter(domain=domain, run=name)["nll"].to_numpy() for name in runs)
        pairs.append((base, run))
    return paired_document_bootstrap(pairs)


def _finding(
    results: Results,
    teacher: PlanTeacher,
    student: float,
    gains: pl.DataFrame,
    verdicts: tuple[Verdict, ...],
) -> TeacherFinding:
    scored = _in_domain(results, (pl.col("kind") == "teacher") & (pl.col("teacher") == teacher.name))
    own = None if scored.is_empty() else float(scored["bits_per_byte"].item())
    best = _best_alpha(gains.filter(teacher=teacher.name, split="validation", role="out_of_domain"))
    return TeacherFinding(
        teacher=teacher,
        bits_per_byte=own,
        relation=None if own is None else relation(own, student),
        best=next((v for v in verdicts if (v.teacher, v.alpha) == (teacher.name, best)), None),
    )


def relation(teacher: float, student: float) -> Relation:
    """Name the pair by its in-domain validation bits per byte, teacher against no-teacher student."""
    if abs(teacher / student - 1) <= SAME_LEVEL_MARGIN:
        return "same-level"
    return "strong-to-weak" if teacher < student else "weak-to-strong"


def _best_alpha(validation: pl.DataFrame) -> float | None:
    """The alpha with the largest mean out-of-domain gain; the smaller one of two equals."""
    means = validation.group_by("alpha").agg(pl.col("gain").mean()).sort("alpha")
    return None if means.is_empty() else float(means["alpha"][means["gain"].arg_max() or 0])


def _domain_table(results: Results, gains: pl.DataFrame) -> pl.DataFrame:
    order = {teacher.name: i for i, teacher in enumerate(results.plan.teachers)}
    inside_first = sorted(results.plan.domains, key=lambda domain: domain.role)
    rank = {domain.name: i for i, domain in enumerate(inside_first)}
    controls = [teacher.name for teacher in results.plan.teachers if teacher.control]
    return (
        gains.filter(split="test")
        .group_by("teacher", "alpha", "domain", "role")
        .agg(pl.col("gain").mean(), n_seeds=pl.len())
        .with_columns(control=pl.col("teacher").is_in(controls))
        .sort(pl.col("teacher").replace_strict(order), "alpha", pl.col("domain").replace_strict(rank))
    )


def _own_bits(results: Results, which: pl.Expr, split: Split) -> pl.DataFrame:
    """Mean bits per byte by domain of the runs that `which` selects."""
    chosen = _scored(results).filter(which).filter(split=split)
    return chosen.group_by("domain").agg(bits_per_byte=pl.col("value").mean()).sort("domain")


def _in_domain(results: Results, which: pl.Expr) -> pl.DataFrame:
    """The in-domain row of `_own_bits` on the validation split; no row if nothing is scored."""
    return _own_bits(results, which, "validation").filter(domain=results.plan.in_domain)
