"""The figures of a study, each with its caption and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from tutelage.analysis import words
from tutelage.analysis.canvas import (
    GREY,
    INK,
    NO_TEACHER,
    PALETTE,
    Figure,
    inline,
    teacher_colour,
    teacher_dash,
    zero_line,
)
from tutelage.analysis.costs import ledger

if TYPE_CHECKING:
    from tutelage.analysis.verdicts import Findings
    from tutelage.study.results import Results

_SIDES = {"in_domain": "in domain", "out_of_domain": "out of domain"}
_CURVE_POINTS = 80
_CURVE_SKIPPED = 0.05
_FEW_DOMAINS = 6


def figures(results: Results, findings: Findings) -> list[Figure]:
    """Every figure that the finished runs allow, in the report's order."""
    drawn = [
        alpha_curves(results, findings),
        trade_off(results, findings),
        domain_gains(findings),
        cost(results),
    ]
    if results.curves.height:
        drawn.insert(3, learning_curves(results, findings))
    return drawn


def alpha_curves(results: Results, findings: Findings) -> Figure:
    """Gain against alpha, one panel in domain and one out of domain, a line per teacher."""
    data = _gain_rows(findings)
    base = alt.Chart().encode(
        x=alt.X("alpha:Q", title="alpha (weight of the teacher)", scale=alt.Scale(nice=False)).axis(
            values=data["alpha"].unique().sort().to_list(), format="~g", grid=False, labelFlush=False
        ),
        color=teacher_colour(results),
    )
    spread = base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        y=alt.Y("low:Q", title="gain (%)"), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2).encode(y="gain:Q", strokeDash=teacher_dash(results))
    points = base.mark_point(filled=True, size=50, opacity=1).encode(y="gain:Q")
    panels = [
        alt.layer(zero_line("y"), spread, line, points)
        .transform_filter(f"datum.side === '{side}'")
        .properties(width=250, height=230, title=side)
        for side in _SIDES.values()
    ]
    chart = alt.hconcat(*panels, data=inline(data)).resolve_scale(y="shared")
    return Figure(
        name="alpha",
        title="How much teacher?",
        caption="Above zero, the student with this teacher needs fewer bits per byte than without. Bars are "
        f"95% intervals ({_intervals(findings)}); alpha 0 is the student without a teacher; test split.",
        spoken="Gain against alpha. " + _in_words(findings),
        chart=chart,
        data=data,
    )


def trade_off(results: Results, findings: Findings) -> Figure:
    """Gain in domain against gain out of domain; labels are alphas."""
    data = pl.DataFrame(
        [
            {
                "teacher": v.teacher,
                "alpha": v.alpha,
                "in_domain": v.in_domain.mean,
                "out_of_domain": v.out_of_domain.mean,
                "n_seeds": v.n_seeds,
            }
            for v in findings.verdicts
        ]
    ).with_columns(label=pl.col("alpha").map_elements(lambda alpha: f"{alpha:g}", return_dtype=pl.String))
    base = alt.Chart().encode(
        x=alt.X("in_domain:Q", title="gain in domain (%)", scale=alt.Scale(padding=24)),
        y=alt.Y("out_of_domain:Q", title="gain out of domain (%)", scale=alt.Scale(padding=24)),
        color=teacher_colour(results),
    )
    trail = base.mark_line(strokeWidth=1, opacity=0.6).encode(
        order="alpha:Q", strokeDash=teacher_dash(results)
    )
    points = base.mark_point(filled=True, size=60, opacity=1)
    labels = base.mark_text(dy=-11, fontSize=11).encode(text="label:N", color=alt.value(INK))
    chart = alt.layer(zero_line("x"), zero_line("y"), trail, points, labels, data=inline(data))
    return Figure(
        name="trade-off",
        title="In domain against out of domain",
        caption="One point per teacher and alpha (the label), joined in order of alpha. Top right gains on "
        "both, top left pays in domain for a gain out of domain. "
        f"Means over {_seeds(findings)}, test split.",
        spoken="Gain in domain against gain out of domain. " + _in_words(findings),
        chart=chart.properties(width=440, height=320),
        data=data.drop("label"),
    )


def domain_gains(findings: Findings) -> Figure:
    """Gain on every domain for every teacher and alpha, as a heat map with numbers."""
    data = findings.domains.with_columns(
        cell=pl.concat_str(
            "teacher", pl.col("alpha").map_elements(lambda a: f" {a:g}", return_dtype=pl.String)
        )
    )
    largest = float(data["gain"].abs().to_numpy().max()) or 1.0
    rows = data["cell"].unique(maintain_order=True).to_list()
    columns = data["domain"].unique(maintain_order=True).to_list()
    base = alt.Chart(inline(data)).encode(
        x=alt.X("domain:N", title="domain (the first is the training text)", sort=columns)
        .axis(orient="top", labelAngle=0 if len(columns) <= _FEW_DOMAINS else -40),
        y=alt.Y("cell:N", title="teacher and alpha", sort=rows),
    )  # fmt: skip
    tiles = base.mark_rect().encode(
        color=alt.Color("gain:Q", legend=None).scale(
            domain=[-largest, 0, largest], range=["#E69F00", "#f4f4f4", "#56B4E9"]
        )
    )
    numbers = base.mark_text(fontSize=11, color="#111").encode(text=alt.Text("gain:Q", format="+.1f"))
    return Figure(
        name="domains",
        title="Gain on each text",
        caption="Percent fewer bits per byte than without a teacher, by text: blue helps, orange hurts. "
        f"Means over {_seeds(findings)}, test split.",
        spoken=f"Heat map of gains for {len(rows)} pairs of teacher and alpha on {len(columns)} texts.",
        chart=alt.layer(tiles, numbers).properties(width=alt.Step(90), height=alt.Step(26)),
        data=data.drop("cell"),
    )


def learning_curves(results: Results, findings: Findings) -> Figure:
    """Training cross-entropy against tokens: no teacher, and each teacher at its best alpha."""
    best = [(t.best.teacher, t.best.alpha) for t in findings.teachers if t.best is not None]
    chosen = results.runs.filter(
        (pl.col("kind") == "baseline")
        | (pl.concat_str("teacher", "alpha", separator="/").is_in([f"{t}/{a}" for t, a in best])
           & (pl.col("kind") == "student"))
    ).with_columns(teacher=pl.col("teacher").fill_null(NO_TEACHER))  # fmt: skip
    last = float(results.curves["tokens"].to_numpy().max())
    data = (
        chosen.select("run", "teacher", "alpha", "seed")
        .join(results.curves, on="run")
        .filter(pl.col("tokens") > _CURVE_SKIPPED * last)
        .with_columns(bin=(pl.col("tokens") / last * _CURVE_POINTS).ceil())
        .group_by("teacher", "alpha", "seed", "run", "bin")
        .agg(pl.col("tokens", "ce").mean())
        .sort("teacher", "seed", "tokens")
        .drop("bin")
    )
    chart = (
        alt.Chart(inline(data))
        .mark_line(strokeWidth=1.2, opacity=0.85)
        .encode(
            x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s")),
            y=alt.Y("ce:Q", title="training cross-entropy (nats per token)", scale=alt.Scale(zero=False)),
            color=teacher_colour(results, with_baseline=True),
            strokeDash=teacher_dash(results, with_baseline=True),
            detail="run:N",
        )
        .properties(width=560, height=260)
    )
    return Figure(
        name="learning",
        title="Learning curves",
        caption=f"Cross-entropy on the training text, means over {_CURVE_POINTS} stretches of a run, from "
        f"{_CURVE_SKIPPED:.0%} of it on. One thin line per run (n = {data['run'].n_unique()}); each teacher "
        "at its best alpha.",
        spoken="Training cross-entropy against training tokens for the student without a teacher and for "
        "each teacher at its best alpha.",
        chart=chart,
        data=data,
    )


def cost(results: Results) -> Figure:
    """FLOPs per run, by kind of run and by what they were spent on."""
    costs = ledger(results)
    parts = {"train_flops": "forward and backward", "teacher_flops": "teacher forward"}
    own = pl.when(pl.col("kind") == "teacher").then(pl.lit("training the teacher"))
    data = (
        costs.select("label", "kind", "runs", **{name: pl.col(key) for key, name in parts.items()})
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
            y=alt.Y("label:N", title=None, sort=costs["label"].to_list()),
            color=alt.Color("part:N", title=None).scale(
                domain=[*parts.values(), "training the teacher"], range=[PALETTE[1], PALETTE[4], GREY]
            ),
        )
        .properties(width=440, height=alt.Step(28))
    )
    return Figure(
        name="cost",
        title="What a run costs",
        caption="Model FLOPs of one run, mean over finished runs of its kind. A teacher in the loop adds its "
        "forward pass; training the teacher is a bar of its own, paid once for all its students.",
        spoken="Stacked bars of FLOPs per run for each kind of run.",
        chart=chart,
        data=data,
    )


def _gain_rows(findings: Findings) -> pl.DataFrame:
    """Both gains of every verdict with their intervals, and the origin: no teacher, no gain."""
    rows = []
    for v in findings.verdicts:
        for side, estimate in (
            (_SIDES["in_domain"], v.in_domain),
            (_SIDES["out_of_domain"], v.out_of_domain),
        ):
            numbers = {"gain": estimate.mean, "low": estimate.low, "high": estimate.high}
            rows.append(
                {"teacher": v.teacher, "side": side, "alpha": v.alpha, **numbers, "n_seeds": v.n_seeds}
            )
    data = pl.DataFrame(rows)
    zero = pl.lit(0.0)
    origin = data.unique(["teacher", "side"], keep="first", maintain_order=True).with_columns(
        alpha=zero, gain=zero, low=zero, high=zero
    )
    return pl.concat([origin, data]).sort("side", "teacher", "alpha", maintain_order=True)


def _in_words(findings: Findings) -> str:
    return "; ".join(words.sentence(verdict) for verdict in findings.verdicts) + "."


def _seeds(findings: Findings) -> str:
    counts = sorted({verdict.n_seeds for verdict in findings.verdicts})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"n = {number} {'seed' if counts[-1] == 1 else 'seeds'}"


def _intervals(findings: Findings) -> str:
    kinds = {verdict.interval for verdict in findings.verdicts}
    names = {"seeds": "paired t over seeds", "documents": "bootstrap over documents where there is one seed"}
    return f"{_seeds(findings)}; " + ", ".join(name for kind, name in names.items() if kind in kinds)
