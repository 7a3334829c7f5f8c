"""Take from a judged study what the planner fits: losses of untaught models, gains of constant alphas."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

import polars as pl

from tutelage.models.flops import parameters
from tutelage.models.shapes import find_shape
from tutelage.planner.points import AlonePoint, StudyPoints, TaughtPoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.planner.points import GainSide
    from tutelage.study.results import Results


def points_of(study: JudgedStudy) -> StudyPoints:
    """The points of a study's finished runs.

    Taken are ordinary teachers (`GainsBySeed.pairs`) and their students with a constant alpha.

    Raises:
        UserError: a shape of its plan is not in the table of shapes.
    """
    results = study.results
    scored = _losses(results)
    losses = {run: loss for run, (loss, _) in scored.items()}
    found = [
        point
        for pair in study.by_fit["raw"].pairs()
        for verdict in study.by_fit["raw"].constants(pair)
        if verdict.alpha and (point := _taught(results, losses, pair, verdict)) is not None
    ]
    return StudyPoints(
        studies=(results.plan.name,),
        texts=(results.plan.in_domain,),
        versions=tuple(sorted({version for _, version in scored.values()})),
        alone=tuple(_alone(results, losses)),
        taught=tuple(found),
    )


def _losses(results: Results) -> dict[str, tuple[float, str]]:
    """Nats per token in domain on the validation split and the version of that score, by run."""
    rows = results.scores.filter(metric="perplexity", split="validation", domain=results.plan.in_domain)
    scores = rows.select("run", "value", "version").iter_rows()
    return {run: (log(value), version) for run, value, version in scores}


def _alone(results: Results, losses: Mapping[str, float]) -> list[AlonePoint]:
    """Untaught students and the teachers of the study's own text, each a mean over its runs."""
    plan = results.plan
    sizes = {("baseline", one.name): (one.shape, one.tokens) for one in plan.students}
    sizes |= {
        ("teacher", one.name): (one.shape, one.tokens)
        for one in plan.teachers
        if one.shape is not None and one.tokens is not None and one.corpus is None
    }
    members: dict[tuple[str, str], list[float]] = {}
    for run in plan.runs:
        key = run.kind, str(run.teacher if run.kind == "teacher" else run.student)
        if key in sizes and run.run in losses:
            members.setdefault(key, []).append(losses[run.run])
    return [
        AlonePoint(
            study=plan.name,
            name=name,
            parameters=float(parameters(find_shape(str(sizes[kind, name][0])), 0).non_embedding),
            tokens=float(sizes[kind, name][1] or 0),
            loss=sum(values) / len(values),
            runs=len(values),
        )
        for (kind, name), values in members.items()
    ]


def _taught(
    results: Results, losses: Mapping[str, float], pair: PairFinding, verdict: Verdict
) -> TaughtPoint | None:
    """A pair at one alpha; None where the loss of the teacher or of a student is not known."""
    rows = results.runs.filter(pl.col("stage").is_null(), student=pair.student.name)
    taught = rows.filter(kind="student", teacher=pair.teacher.name, arm=verdict.arm)
    members = {
        "teacher": taught["teacher_run"].drop_nulls().unique().to_list(),
        "alone": rows.filter(kind="baseline")["run"].to_list(),
        "taught": taught["run"].to_list(),
    }
    means = {
        name: sum(known) / len(known)
        for name, runs in members.items()
        if (known := [losses[run] for run in runs if run in losses])
    }
    if len(means) < len(members):
        return None
    gains: dict[GainSide, float] = {
        "in_domain": verdict.in_domain.mean,
        "out_of_domain": verdict.out_of_domain.mean,
    }
    if verdict.fitted is not None:
        gains["fitted"] = verdict.fitted.mean
    return TaughtPoint(
        study=results.plan.name,
        student=pair.student.name,
        teacher=pair.teacher.name,
        parameters=float(parameters(find_shape(pair.student.shape), 0).non_embedding),
        tokens=float(pair.student.tokens),
        teacher_loss=means["teacher"],
        alone_loss=means["alone"],
        loss=means["taught"],
        alpha=float(verdict.alpha or 0),
        seeds=verdict.n_seeds,
        gains=gains,
    )
