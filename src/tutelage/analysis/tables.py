"""Comparisons of a report: policies against constants, equal compute, the spread of the baseline's seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from tutelage.analysis.claims.evidence import Series, has_setting, minus
from tutelage.analysis.gains import base_scores, roles_of
from tutelage.analysis.stats import Estimate, on_front, t_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.gains import Side
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.study.results import Results

_MEANS = ["tokens", "train_flops", "teacher_flops", "seconds", "tokens_per_second"]
_KINDS = {"baseline": 0, "student": 1, "after": 2, "teacher": 3}
_UNTAUGHT = "no teacher"
_A_BATCH = 0.05
"""Part of its compute by which a student that is given a teacher's may be off, in whole batches."""


def ledger(results: Results) -> pl.DataFrame:
    """One row per kind of run that has finished runs: no teacher, student of X, after a stage, training of X.

    Columns: label, kind, student (null for teachers), teacher, stage, runs (number finished), tokens,
    train_flops (forward and backward of the trained model), teacher_flops (forward of its teacher), seconds,
    tokens_per_second. All but `runs` are means per run.
    """
    teachers = {teacher.name: i for i, teacher in enumerate(results.plan.teachers)}
    students = {student.name: i for i, student in enumerate(results.plan.students)}
    untaught = (pl.col("kind") == "student") & pl.col("teacher").is_null()
    label = (
        pl.when(untaught)
        .then(pl.format("{}, {}", pl.lit(_UNTAUGHT), "arm"))
        .when(pl.col("kind") == "student")
        .then(pl.format("student of {}", "teacher"))
        .when(pl.col("kind") == "teacher")
        .then(pl.format("training of {}", "teacher"))
        .when(pl.col("kind") == "after")
        .then(pl.format("{} of {}", "stage", pl.col("teacher").fill_null(_UNTAUGHT)))
        .otherwise(pl.lit(_UNTAUGHT))
    )
    return (
        results.runs.filter(status="done")
        .with_columns(label=label)
        .group_by("kind", "student", "teacher", "stage", "label")
        .agg(pl.len().alias("runs"), pl.col(_MEANS).mean())
        .sort(
            pl.col("student").replace_strict(students, default=len(students), return_dtype=pl.Int64),
            pl.col("kind").replace_strict(_KINDS, return_dtype=pl.Int64),
            pl.col("teacher").replace_strict(teachers, default=-1, return_dtype=pl.Int64),
            "label",
        )
        .select("label", "kind", "student", "teacher", "stage", "runs", *_MEANS)
    )


def overhead(results: Results) -> dict[str, float]:
    """FLOPs per token of a student with each teacher, as a multiple of its own; mean over students."""
    students = (
        results.runs.filter(kind="student", status="done")
        .filter(pl.col("teacher").is_not_null(), pl.col("train_flops") > 0)
        .with_columns(factor=1 + pl.col("teacher_flops") / pl.col("train_flops"))
        .group_by("student", "teacher")
        .agg(pl.col("factor").max())
    )
    order = [teacher.name for teacher in results.plan.teachers]
    factors = {name: students.filter(teacher=name)["factor"] for name in order}
    return {name: float(found.to_numpy().mean()) for name, found in factors.items() if len(found)}


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One arm in the tournament of a student and a teacher.

    Attributes:
        verdict: its gains.
        ahead: out-of-domain gain minus that of the best constant alpha, paired by seed; None for that one,
            without one, and with less than two seeds.
        raw_front: whether no other arm gains as much on both sides and more on one, raw; None where some
            arm has one seed.
        fitted_front: the same with the out-of-domain gain fitted.
        cost: FLOPs of a run, teacher forward included, as a multiple of the untaught student's.
    """

    verdict: Verdict
    ahead: Estimate | None
    raw_front: bool | None
    fitted_front: bool | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class EqualCompute:
    """One pair at its best alpha: at equal tokens, and against the untaught student of equal compute.

    Attributes:
        pair: student and teacher.
        best: its verdict at its best alpha.
        cost: FLOPs of a run, teacher forward included, as a multiple of the untaught student's.
        teacher_training: FLOPs of training the teacher, and of what taught it, as the same multiple; None if
            the study did not.
        matched: the untaught student that spent the teacher's forward on tokens; None if there is none, or if
            the best arm runs its teacher in part and so spent less.
        lead: gain of the pair minus that of `matched`, by side; None with less than two seeds.
    """

    pair: PairFinding
    best: Verdict
    cost: float | None
    teacher_training: float | None
    matched: Verdict | None
    lead: dict[Side, Estimate | None]


def tournaments(study: JudgedStudy) -> list[tuple[PairFinding, list[PolicyResult]]]:
    """Every pair that has other arms than constant alphas: its arms by falling out-of-domain gain."""
    raw_gains = study.by_fit["raw"]
    costs = _costs(study)
    found = []
    for pair in study.findings.pairs:
        arms = raw_gains.arms(pair.student.name, pair.teacher.name)
        if pair.best is None or all(arm.constant for arm in arms):
            continue
        champion = raw_gains.gain(pair.best, "out_of_domain") if pair.best.constant else {}
        raw = _front(arms, [(arm.in_domain.mean, arm.out_of_domain.mean) for arm in arms])
        fitted = _front(arms, [(arm.in_domain.mean, (arm.fitted or arm.out_of_domain).mean) for arm in arms])
        policies = [
            PolicyResult(
                verdict=arm,
                ahead=None if arm is pair.best else _paired(raw_gains.gain(arm, "out_of_domain"), champion),
                raw_front=raw[i],
                fitted_front=fitted[i],
                cost=costs.get(arm.cell),
            )
            for i, arm in enumerate(arms)
        ]
        found.append((pair, sorted(policies, key=lambda one: -one.verdict.out_of_domain.mean)))
    return found


def equal_compute(study: JudgedStudy) -> list[EqualCompute]:
    """Every pair with a real teacher and a best alpha."""
    results, raw_gains = study.results, study.by_fit["raw"]
    costs = _costs(study)
    training = _teacher_training(study)
    alone = dict(
        results.runs.filter(kind="baseline").group_by("student").agg(pl.col("train_flops").mean()).iter_rows()
    )
    sides: tuple[Side, Side] = ("in_domain", "out_of_domain")
    found = []
    for pair in study.findings.pairs:
        if pair.best is None or pair.teacher.control:
            continue
        name, base = pair.teacher.name, alone.get(pair.student.name)
        spent = raw_gains.arms(pair.student.name, None)
        matched = next((v for v in spent if has_setting(v.arm_settings, "compute_of", name)), None)
        if matched is not None and _spent_less(costs.get(pair.best.cell), costs.get(matched.cell)):
            matched = None
        lead = {
            side: None
            if matched is None
            else _paired(raw_gains.gain(pair.best, side), raw_gains.gain(matched, side))
            for side in sides
        }
        trained = training.get(pair.best.cell)
        own = trained / base if trained is not None and base else None
        found.append(EqualCompute(pair, pair.best, costs.get(pair.best.cell), own, matched, lead))
    return found


def _teacher_training(study: JudgedStudy) -> dict[int, float]:
    """FLOPs that training the teachers of each cell took, mean over its runs; of a chain all before it."""
    spent = pl.col("train_flops") + pl.col("teacher_flops").fill_null(0.0)
    rows = study.results.runs.select("run", "teacher_run", spent=spent)
    taught_by = {run: (teacher, flops) for run, teacher, flops in rows.iter_rows()}

    def behind(run: str) -> float | None:
        teacher = taught_by[run][0]
        if teacher is None or teacher not in taught_by or taught_by[teacher][1] is None:
            return None
        return float(taught_by[teacher][1]) + (behind(teacher) or 0.0)

    cells: dict[int, list[float]] = {}
    for cell, run in study.findings.gains.domains.select("cell", "run").unique().sort("run").iter_rows():
        if (flops := behind(run)) is not None:
            cells.setdefault(cell, []).append(flops)
    found = {cell: sum(flops) / len(flops) for cell, flops in cells.items()}
    parts = {teacher.name: teacher.of for teacher in study.results.plan.teachers if teacher.of}
    trained = study.results.runs.filter(kind="teacher").group_by("teacher").agg(pl.col("train_flops").mean())
    alone = dict(trained.drop_nulls().iter_rows())
    for verdict in study.findings.verdicts:
        if own := [alone[name] for name in parts.get(str(verdict.teacher), ()) if name in alone]:
            found[verdict.cell] = sum(own)
    return found


def seed_spread(results: Results) -> pl.DataFrame:
    """How much untaught students of one setting differ from seed to seed, before any comparison.

    Returns:
        student, n, in_domain and out_of_domain (bits per byte, the latter a mean over domains), and
        in_domain_spread and out_of_domain_spread (standard deviation over seeds in percent of the mean; null
        for one seed). Test split.
    """
    order = {student.name: i for i, student in enumerate(results.plan.students)}
    scores = results.scores.filter(metric="bits_per_byte", split="test").join(roles_of(results), on="domain")
    value, sides = pl.col("value"), ("in_domain", "out_of_domain")
    return (
        results.runs.filter(kind="baseline", twin=0)
        .join(scores, on="run")
        .group_by("student", "seed", "role")
        .agg(value.mean())
        .group_by("student", "role")
        .agg(n=pl.len(), mean=value.mean(), spread=100 * value.std() / value.mean())
        .group_by("student", "n")
        .agg(
            *(pl.col("mean").filter(role=side).first().alias(side) for side in sides),
            *(pl.col("spread").filter(role=side).first().alias(f"{side}_spread") for side in sides),
        )
        .sort(pl.col("student").replace_strict(order, return_dtype=pl.Int64))
    )


def calibration_errors(study: JudgedStudy) -> dict[int, dict[str, float]]:
    """ECE and Brier score minus the baseline's by cell: ece_in_domain, ece_out_of_domain, brier_..."""
    results = study.results
    scores = results.scores.filter(pl.col("metric").is_in(["ece", "brier"]), split="test")
    scores = scores.join(roles_of(results), on="domain").select("run", "domain", "role", "metric", "value")
    pairs = study.findings.gains.domains.select("cell", "run", "base_run").unique(maintain_order=True)
    base = base_scores(results).filter(split="test").rename({"value": "base"}).drop("split")
    means = (
        pairs.join(scores, on="run")
        .join(base, on=["base_run", "domain", "metric"])
        .group_by("cell", "metric", "role")
        .agg((pl.col("value") - pl.col("base")).mean())
        .sort("cell", "metric", "role")
    )
    found: dict[int, dict[str, float]] = {}
    for cell, metric, role, value in means.iter_rows():
        found.setdefault(cell, {})[f"{metric}_{role}"] = value
    return found


def _costs(study: JudgedStudy) -> dict[int, float]:
    """FLOPs of each cell's runs, teacher forward included, as a multiple of their baselines'."""
    spent = study.results.runs.select(
        "run", total=pl.col("train_flops") + pl.col("teacher_flops"), own=pl.col("train_flops")
    )
    pairs = study.findings.gains.domains.select("cell", "run", "base_run").unique()
    return dict(
        pairs.join(spent.select("run", "total"), on="run")
        .join(spent.select(base_run="run", base="own"), on="base_run")
        .filter(pl.col("base") > 0)
        .group_by("cell")
        .agg((pl.col("total") / pl.col("base")).mean())
        .iter_rows()
    )


def _spent_less(taught: float | None, untaught: float | None) -> bool:
    """Whether a teacher beside its student ran for less than the untaught student was given for it.

    Cost is 1 where targets were cached; what making them cost is not in it.
    """
    if taught is None or untaught is None or taught == 1:
        return False
    return taught < untaught * (1 - _A_BATCH)


def _paired(first: Series, second: Series) -> Estimate | None:
    values = [*minus(first, second).values()]
    return t_interval(values) if len(values) > 1 else None


def _front(arms: Sequence[Verdict], points: Sequence[tuple[float, float]]) -> list[bool] | list[None]:
    """Which points are on the front; None: not judged."""
    return on_front(points) if all(arm.judged for arm in arms) else [None] * len(points)
