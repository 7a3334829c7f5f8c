"""Draw the figures of a study in the order of the page; here those of calibration, curves and costs."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from tutelage.analysis.figures.gain_figures import (
    accuracy_curves,
    alpha_curves,
    domain_gains,
    heat_map,
    strength_curves,
    trade_off,
)
from tutelage.analysis.figures.style import (
    GREY,
    INK,
    PALETTE,
    Figure,
    Key,
    inline,
    key_of,
    label_front,
    within_reach,
)
from tutelage.analysis.tables import calibration_errors, ledger
from tutelage.analysis.words import NO_TEACHER, arm, grey_note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.claims.judge import JudgedStudy
    from tutelage.analysis.verdicts import PairFinding, Verdict
    from tutelage.study.results import Results

_CURVE_POINTS = 80
_CURVE_SKIPPED = 0.05
_MOST_CURVES = 5
_MOST_BARS = 30


def calibration(study: JudgedStudy, verdicts: Sequence[Verdict], key: Key, suffix: str) -> Figure:
    """Raw against fitted gain out of domain, and calibration error in and out of domain."""
    errors = calibration_errors(study)
    rows = [
        {
            "teacher": v.teacher or NO_TEACHER,
            "name": f"{v.teacher or NO_TEACHER} {arm(v)}",
            "series": key.series[v.teacher],
            "arm": v.arm,
            "raw": v.out_of_domain.mean,
            "fitted": v.fitted.mean,
            "n_seeds": v.n_seeds,
        }
        | errors.get(v.cell, {})
        for v in verdicts
        if v.fitted is not None
    ]
    data = pl.DataFrame(rows)
    near, left_out = within_reach(data, "raw", "fitted")
    key = key.only(near["series"].unique())
    both = [*near["raw"], *near["fitted"], 0.0]
    ends = [{"raw": end, "fitted": end} for end in (min(both), max(both))]
    line = alt.Chart(alt.InlineData(values=ends)).mark_line(color=INK, opacity=0.5, strokeWidth=1)
    gains = (
        alt.Chart()
        .mark_point(filled=True, size=45, opacity=1)
        .encode(
            x=alt.X("raw:Q", title="gain out of domain, raw (%)"),
            y=alt.Y("fitted:Q", title="gain out of domain, fitted (%)"),
            color=key.colour(points=True),
        )
    )
    names = label_front(gains, near["name"].to_list(), near.select("raw", "fitted").rows())
    diagonal = line.encode(x="raw:Q", y="fitted:Q")
    panels = [alt.layer(diagonal, gains, names).properties(width=270, height=230)]
    if "ece_in_domain" in data.columns:
        panels.append(
            alt.Chart()
            .mark_point(filled=True, size=45, opacity=1)
            .encode(
                x=alt.X("ece_in_domain:Q", title="change of calibration error in domain"),
                y=alt.Y("ece_out_of_domain:Q", title="change out of domain"),
                color=key.colour(points=True),
            )
            .properties(width=240, height=230)
        )
    return Figure(
        name=f"calibration{suffix}",
        title="Knowledge or calibration?",
        caption="Left: what is left of a raw gain out of domain when every model gets its best temperature "
        "and unigram mixture; on the line all of it, at zero none; named is what no other arm "
        "beats on both. Right: expected calibration error less "
        "that of the student without a teacher; below zero is better calibrated. Means over seeds, test "
        f"split.{left_out}{grey_note(verdicts)}",
        spoken="Raw against fitted gain out of domain, and change of calibration error in and out of domain, "
        f"for {len(rows)} arms.",
        chart=alt.hconcat(*panels, data=inline(near)),
        data=data.drop("series", "name"),
    )


def learning_curves(study: JudgedStudy, pairs: Sequence[PairFinding], suffix: str) -> list[Figure]:
    """Training cross-entropy against tokens: no teacher, and the best teachers at their best alpha."""
    ranked = sorted(
        (pair for pair in pairs if pair.best is not None),
        key=lambda pair: -pair.best.out_of_domain.mean if pair.best else 0.0,
    )
    kept = [pair for pair in pairs if pair in ranked[:_MOST_CURVES]]
    names = {pair.best.cell: pair.teacher.name for pair in kept if pair.best is not None}
    if not names:  # no pair has a gain out of domain
        return []
    gains = study.findings.gains.domains.select("cell", "run", "base_run", "seed").unique()
    chosen = gains.filter(pl.col("cell").is_in(list(names)))
    taught = chosen.select(
        "run", "seed", teacher=pl.col("cell").replace_strict(names, return_dtype=pl.String)
    )
    alone = chosen.select("seed", run="base_run", teacher=pl.lit(NO_TEACHER)).select("run", "seed", "teacher")
    curves = pl.concat([alone, taught]).unique().join(study.results.curves, on="run")
    if curves.is_empty():
        return []
    last = float(curves["tokens"].to_numpy().max())
    data = (
        curves.filter(pl.col("tokens") > _CURVE_SKIPPED * last)
        .with_columns(bin=(pl.col("tokens") / last * _CURVE_POINTS).ceil())
        .group_by("teacher", "seed", "run", "bin")
        .agg(pl.col("tokens", "ce").mean())
        .sort("teacher", "seed", "run", "tokens")
        .drop("bin")
    )
    key = key_of(pairs, with_baseline=True)
    series = {name: key.series.get(name, name) for name in data["teacher"].unique(maintain_order=True)}
    drawn = data.with_columns(series=pl.col("teacher").replace_strict(series, return_dtype=pl.String))
    key = key.only({*series.values()})
    chart = (
        alt.Chart(inline(drawn))
        .mark_line(strokeWidth=1.2, opacity=0.85)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("ce:Q", title="training cross-entropy (nats per token)", scale=alt.Scale(zero=False)),
            color=key.colour(),
            strokeDash=key.dash(),
            detail="run:N",
        )
        .properties(width=560, height=260)
    )
    some = f" The {_MOST_CURVES} largest gains." if len(ranked) > _MOST_CURVES else ""
    return [
        Figure(
            name=f"learning{suffix}",
            title="Learning curves",
            caption=f"Cross-entropy on the training text, means over {_CURVE_POINTS} stretches of a run, "
            f"from {_CURVE_SKIPPED:.0%} of it on. One thin line per run (n = {data['run'].n_unique()}); each "
            f"teacher at its best alpha.{some}",
            spoken="Training cross-entropy against training tokens for the student without a teacher and for "
            "each teacher at its best alpha.",
            chart=chart,
            data=data,
            folded=True,
        )
    ]


def cost(results: Results) -> Figure:
    """FLOPs per run, by kind of run and by what they were spent on."""
    costs = ledger(results)
    if len(results.plan.students) > 1:
        several = pl.when(pl.col("student").is_not_null()).then(pl.format("{}: {}", "student", "label"))
        costs = costs.with_columns(label=several.otherwise(pl.col("label")))
    shown = costs.head(_MOST_BARS)
    parts = {"train_flops": "forward and backward", "teacher_flops": "teacher forward"}
    own = pl.when(pl.col("kind") == "teacher").then(pl.lit("training the teacher"))
    data = (
        shown.select("label", "kind", "runs", **{name: pl.col(key) for key, name in parts.items()})
        .unpivot(index=["label", "kind", "runs"], variable_name="part", value_name="flops")
        .with_columns(part=own.otherwise(pl.col("part")))
        .filter(pl.col("flops") > 0)
        .drop("kind")
    )
    chart = (
        alt.Chart(inline(data))
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X("flops:Q", title="FLOPs per run", axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("label:N", title=None, sort=shown["label"].to_list()).axis(labelLimit=300),
            color=alt.Color("part:N", title=None).scale(
                domain=[*parts.values(), "training the teacher"], range=[PALETTE[1], PALETTE[4], GREY]
            ),
        )
        .properties(width=440, height=alt.Step(24))
    )
    rest = f" The first {_MOST_BARS} of {costs.height} kinds." if costs.height > _MOST_BARS else ""
    return Figure(
        name="cost",
        title="What a run costs",
        caption="Model FLOPs of one run, mean over finished runs of its kind. A teacher in the loop adds its "
        "forward pass, cached targets none; training the teacher is a bar of its own, paid once for all its "
        f"students.{rest}",
        spoken="Stacked bars of FLOPs per run for each kind of run.",
        chart=chart,
        data=data,
        folded=True,
    )


_FEW_TEACHERS = 6
_FEW_ROWS = 24
_ENOUGH_FOR_A_CURVE = 3


def figures(study: JudgedStudy, students: Sequence[str]) -> dict[str | None, list[Figure]]:
    """Every figure that the finished runs allow, by student in the report's order; last, the study's own.

    Args:
        study: the study.
        students: those to draw.
    """
    results, findings = study.results, study.findings
    drawn: dict[str | None, list[Figure]] = {}
    for student in students:
        pairs = [pair for pair in findings.pairs if pair.student.name == student]
        verdicts = [v for v in findings.verdicts if v.student == student and v.stage is None]
        if verdicts:
            suffix = "" if len(results.plan.students) == 1 else f"-{_slug(student)}"
            drawn[student] = _of_student(study, pairs, verdicts, suffix)
    drawn[None] = [cost(results)]
    return drawn


def _of_student(
    study: JudgedStudy,
    pairs: Sequence[PairFinding],
    verdicts: Sequence[Verdict],
    suffix: str,
) -> list[Figure]:
    """Figures of one student; where some arms have several seeds, those with one are in the tables alone."""
    verdicts = [v for v in verdicts if v.judged] or verdicts
    pairs = [pair for pair in pairs if pair.teacher.name in {v.teacher for v in verdicts}]
    constants = [v for v in verdicts if v.constant]
    best = [pair.best for pair in pairs if pair.best is not None]
    alphas = Counter(v.teacher for v in constants)
    ordinary = [pair for pair in pairs if pair.relation and not (pair.teacher.corpus or pair.teacher.targets)]
    shown = verdicts if len(verdicts) <= _FEW_ROWS else best
    key = key_of(pairs)
    whole = key if all(v.teacher for v in verdicts) else key_of(pairs, with_baseline=True)
    compared = max(alphas.values(), default=0) > 1
    drawn = []
    if constants and (compared or not shown):
        drawn.append(heat_map(constants, suffix))
    if shown:
        drawn.append(domain_gains(study.findings, shown, suffix))
    if compared and sum(not pair.teacher.control for pair in pairs) <= _FEW_TEACHERS:
        drawn.append(alpha_curves(constants, key, suffix))
        drawn += filter(None, [accuracy_curves(constants, study.accuracies, key, suffix)])
    if len(verdicts) >= _ENOUGH_FOR_A_CURVE:
        drawn.append(trade_off(verdicts, whole, suffix))
    if len(ordinary) >= _ENOUGH_FOR_A_CURVE:
        drawn.append(strength_curves(ordinary, suffix))
    if len(verdicts) >= _ENOUGH_FOR_A_CURVE and any(v.fitted for v in verdicts):
        drawn.append(calibration(study, verdicts, whole, suffix))
    if study.results.curves.height:
        drawn += learning_curves(study, pairs, suffix)
    return drawn


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
