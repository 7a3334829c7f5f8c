"""Draw gains by alpha, teacher, strength and text, and in domain against out of domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from tutelage.analysis import words
from tutelage.analysis.accuracy import MEAN
from tutelage.analysis.figures.style import (
    GREY,
    INK,
    Figure,
    Key,
    inline,
    label_front,
    one_seed,
    within_reach,
    zero_line,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.analysis.accuracy import Accuracies
    from tutelage.analysis.stats import Estimate
    from tutelage.analysis.verdicts import Findings, PairFinding, Verdict

_SIDES = {"in_domain": "in domain", "out_of_domain": "out of domain"}
_FEW_DOMAINS = 6
_FEW_LABELS = 14
_TITLE_WIDTH = 150
_TILES = ["#E69F00", "#f4f4f4", "#56B4E9"]
_UNJUDGED = "#dddddd"


def heat_map(verdicts: Sequence[Verdict], suffix: str) -> Figure:
    """Gain by alpha and teacher, in domain, out of domain, and out of domain fitted."""
    data = _gain_rows(verdicts)
    largest = float(data["gain"].abs().to_numpy().max()) or 1.0
    rows = data["teacher"].unique(maintain_order=True).to_list()
    alphas = data["alpha"].unique().sort().to_list()
    base = alt.Chart().encode(
        x=alt.X("alpha:O", title="alpha", sort=alphas).axis(format="~g", labelAngle=0),
    )
    tiles = base.mark_rect().encode(color=_tile_colour(largest))
    numbers = _tile_numbers(base)
    sides = data["side"].unique(maintain_order=True).to_list()
    step = max(34, _TITLE_WIDTH // len(alphas))
    panels = [
        alt.layer(tiles, numbers)
        .encode(y=alt.Y("teacher:N", title=None, sort=rows).axis(labels=i == 0, ticks=i == 0))
        .transform_filter(f"datum.side === '{side}'")
        .properties(width=alt.Step(step), height=alt.Step(26), title=side)
        for i, side in enumerate(sides)
    ]
    return Figure(
        name=f"heat{suffix}",
        title="Alpha by teacher",
        caption="Percent fewer bits per byte than without a teacher, one row per teacher and one column per "
        f"alpha: blue gains, orange loses. Means over {words.seeds(verdicts)}, test split."
        + words.grey_note(verdicts),
        spoken="Heat maps of gain by teacher and alpha. " + words.in_words(verdicts),
        chart=alt.hconcat(*panels, data=inline(data), spacing=18),
        data=data,
    )


def alpha_curves(verdicts: Sequence[Verdict], key: Key, suffix: str) -> Figure:
    """Gain against alpha, one panel in domain and one out of domain, a line per teacher."""
    data = _with_origin(_gain_rows(verdicts).filter(pl.col("side").is_in([*_SIDES.values()])))
    return Figure(
        name=f"alpha{suffix}",
        title="How much teacher?",
        caption="Above zero, the student with this teacher needs fewer bits per byte than without. Bars are "
        f"95% intervals ({words.intervals(verdicts)}); alpha 0 is the student without a teacher; test split."
        + words.grey_note(verdicts),
        spoken="Gain against alpha. " + words.in_words(verdicts),
        chart=_by_alpha(data, key, [*_SIDES.values()], "gain (%)"),
        data=data,
    )


def accuracy_curves(verdicts: Sequence[Verdict], known: Accuracies, key: Key, suffix: str) -> Figure | None:
    """Accuracy above the untaught against alpha, mean over tasks, a line per teacher; None without any."""
    asked = [(v, known.gains[v.cell, MEAN].gain) for v in verdicts if (v.cell, MEAN) in known.gains]
    if not asked:
        return None
    side = f"mean of {len(known.in_mean)} tasks" if len(known.in_mean) > 1 else known.in_mean[0]
    data = pl.DataFrame(
        [
            {"teacher": v.teacher, "side": side, "alpha": v.alpha} | _drawn(gain) | {"n_seeds": gain.n}
            for v, gain in asked
        ],
        schema_overrides=dict.fromkeys(("low", "high"), pl.Float64),
    )
    data = _with_origin(data)
    counts = sorted({gain.n for _, gain in asked})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return Figure(
        name=f"accuracy{suffix}",
        title="How many more questions are answered right?",
        caption="Above zero, the student with this teacher answers more questions of downstream tasks right "
        f"than without, in percentage points. Bars are 95% intervals (paired t over seeds, n = {n}; none of "
        f"one); alpha 0 is the student without a teacher. Tasks: {', '.join(known.in_mean)}.",
        spoken="Accuracy on downstream tasks above that of the untaught student, against alpha. "
        + "; ".join(f"{v.teacher}, {v.arm}: {gain.mean:+.1f} points" for v, gain in asked)
        + ".",
        chart=_by_alpha(data, key, [side], "points of accuracy"),
        data=data,
    )


def _by_alpha(data: pl.DataFrame, key: Key, sides: Sequence[str], measured: str) -> alt.HConcatChart:
    """A panel for each side: what is measured against alpha, with its intervals, a line per teacher."""
    data = data.with_columns(series=pl.col("teacher").replace_strict(dict(key.series)))
    base = alt.Chart().encode(
        x=alt.X("alpha:Q", title="alpha (weight of the teacher)", scale=alt.Scale(nice=False)).axis(
            values=data["alpha"].unique().sort().to_list(), format="~g", grid=False, labelFlush=False
        ),
        color=key.colour(),
    )
    spread = base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        y=alt.Y("low:Q", title=measured), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2).encode(y="gain:Q", strokeDash=key.dash())
    points = base.mark_point(filled=True, size=50, opacity=1).encode(y="gain:Q")
    panels = [
        alt.layer(zero_line("y"), spread, line, points)
        .transform_filter(f"datum.side === '{side}'")
        .properties(width=250, height=230, title=side)
        for side in sides
    ]
    chart: alt.HConcatChart = alt.hconcat(*panels, data=inline(data)).resolve_scale(y="shared")
    return chart


def trade_off(verdicts: Sequence[Verdict], key: Key, suffix: str) -> Figure:
    """Gain in domain against gain out of domain of every arm; labels are alphas."""
    data = pl.DataFrame(
        [
            {
                "teacher": v.teacher or words.NO_TEACHER,
                "name": f"{v.teacher or words.NO_TEACHER} {words.arm(v)}",
                "series": key.series[v.teacher],
                "arm": v.arm,
                "kind": "constant alpha" if v.constant else "other",
                "alpha": v.alpha if v.constant else None,
                "in_domain": v.in_domain.mean,
                "out_of_domain": v.out_of_domain.mean,
                "n_seeds": v.n_seeds,
            }
            for v in verdicts
        ],
        schema_overrides={"alpha": pl.Float64},
    )
    near, left_out = within_reach(data, "in_domain", "out_of_domain")
    many = len(verdicts) > _FEW_LABELS
    shown = key.only(data["series"].unique())
    base = alt.Chart().encode(
        x=alt.X("in_domain:Q", title="gain in domain (%)", scale=alt.Scale(padding=24)),
        y=alt.Y("out_of_domain:Q", title="gain out of domain (%)", scale=alt.Scale(padding=24)),
        color=shown.colour(),
    )
    layers = [zero_line("x"), zero_line("y")]
    constant = "datum.kind === 'constant alpha'"
    layers.append(
        base.mark_line(strokeWidth=1, opacity=0.6)
        .encode(order="alpha:Q", strokeDash=shown.dash(), detail="teacher:N")
        .transform_filter(constant)
    )
    shape = alt.Shape("kind:N", title=None, legend=None).scale(
        domain=["constant alpha", "other"], range=["circle", "triangle-up"]
    )
    layers.append(base.mark_point(filled=True, size=45 if many else 60, opacity=1).encode(shape=shape))
    if many:
        front = label_front(base, near["name"].to_list(), near.select("in_domain", "out_of_domain").rows())
        layers.append(front)
        named = "One point per teacher and arm; named is what no other beats on both"
    else:
        text = base.mark_text(dy=-11, fontSize=11).encode(color=alt.value(INK))
        layers.append(text.encode(text=alt.Text("alpha:Q", format="~g")).transform_filter(constant))
        named = "One point per teacher and alpha (the label)"
    triangles = " Triangles are other arms than a constant alpha." if data["alpha"].null_count() else ""
    triangles += left_out + words.grey_note(verdicts)
    return Figure(
        name=f"trade-off{suffix}",
        title="In domain against out of domain",
        caption=f"{named}, constants joined in order of alpha. Top right gains on both, top left pays in "
        f"domain for a gain out of domain.{triangles} Means over {words.seeds(verdicts)}, test split.",
        spoken="Gain in domain against gain out of domain. " + words.in_words(verdicts),
        chart=alt.layer(*layers, data=inline(near)).properties(width=460, height=330),
        data=data.drop("series", "name"),
    )


def strength_curves(pairs: Sequence[PairFinding], suffix: str) -> Figure:
    """Gain at the best alpha against the teacher's size, its tokens and its measured strength."""
    rows = [row for pair in pairs for row in _strength_rows(pair)]
    data = pl.DataFrame(
        rows, infer_schema_length=None, schema_overrides=dict.fromkeys(("low", "high"), pl.Float64)
    )
    sides = ["in domain", "out of domain", "out of domain, fitted"]
    legend = alt.Legend(symbolOpacity=1)
    colour = alt.Color("side:N", title=None, legend=legend, condition=one_seed(GREY)).scale(
        domain=sides, range=["#0090D8", "#D55E00", "#E69F00"]
    )
    panels = []
    for field, title, log, detail in (
        ("parameters", "teacher's parameters", True, "tokens:N"),
        ("tokens", "teacher's training tokens", True, "shape:N"),
        ("strength", "fewer bits per byte than the student (%)", False, None),
    ):
        x = alt.X(
            f"{field}:Q",
            title=title,
            scale=alt.Scale(type="log" if log else "linear", nice=False, padding=12),
        )
        x = x.axis(
            format=".3~s" if log else "~f", tickCount=4, values=_ticks(data, field) if log else alt.Undefined
        )
        base = alt.Chart().encode(x=x, color=colour)
        encoded = {} if detail is None else {"detail": detail}
        bars = base.mark_rule(opacity=0.4).encode(y=alt.Y("low:Q", title="gain (%)"), y2="high:Q")
        line = base.mark_line(strokeWidth=1, opacity=0.5).encode(y="gain:Q", **encoded)
        points = base.mark_point(filled=True, size=40, opacity=1).encode(y="gain:Q")
        names = base.mark_text(dy=-10, fontSize=9).encode(y="gain:Q", text="teacher:N", color=alt.value(INK))
        named = [] if detail else [names.transform_filter("datum.side === 'out of domain'")]
        layers = (zero_line("y"), bars, line, points, *named)
        panels.append(alt.layer(*layers).properties(width=190 if detail else 250, height=200))
    best = [pair.best for pair in pairs if pair.best is not None]
    return Figure(
        name=f"strength{suffix}",
        title="Is a stronger teacher better?",
        caption="Gain at each ordinary teacher's best alpha (chosen on validation), against its parameters "
        "(lines join equal tokens), its tokens (lines join equal shapes) and its measured strength; right of "
        "0 the teacher is better than the untaught student. Bars are 95% intervals "
        f"({words.intervals(best)}).{words.grey_note(best)}",
        spoken="Gain at the best alpha against the teacher's size, tokens and measured strength. "
        + words.in_words([v for v in best if not v.control]),
        chart=alt.hconcat(*panels, data=inline(data)).resolve_scale(y="shared"),
        data=data,
    )


def _ticks(data: pl.DataFrame, field: str) -> list[float]:
    return data[field].drop_nulls().unique().sort().to_list()


def _strength_rows(pair: PairFinding) -> list[dict[str, str | float | None]]:
    if pair.best is None or pair.bits_per_byte is None or pair.student_bits is None:
        return []
    sides = {"in domain": pair.best.in_domain, "out of domain": pair.best.out_of_domain}
    if pair.best.fitted is not None:
        sides["out of domain, fitted"] = pair.best.fitted
    teacher: dict[str, str | float | None] = {
        "teacher": pair.teacher.name,
        "shape": pair.teacher.shape,
        "parameters": pair.teacher.parameters,
        "tokens": pair.teacher.tokens,
        "strength": 100 * (1 - pair.bits_per_byte / pair.student_bits),
        "arm": pair.best.arm,
    }
    return [teacher | {"side": side, **_drawn(e), "n_seeds": pair.best.n_seeds} for side, e in sides.items()]


def domain_gains(findings: Findings, verdicts: Sequence[Verdict], suffix: str) -> Figure:
    """Gain on every domain of each cell as heat maps with numbers: raw, and with calibration fitted."""
    cells = [v.cell for v in verdicts]
    shown = pl.col("cell").is_in(cells), pl.col("fit").is_in(["raw", "unigram"])
    data = findings.domains.filter(*shown).with_columns(
        row=pl.col("cell").replace_strict(
            {v.cell: f"{v.teacher or words.NO_TEACHER} {words.arm(v)}" for v in verdicts}
        )
    )
    largest = float(data["gain"].abs().to_numpy().max()) or 1.0
    rows = data["row"].unique(maintain_order=True).to_list()
    columns = data["domain"].unique(maintain_order=True).to_list()
    base = alt.Chart().encode(
        x=alt.X("domain:N", title=None, sort=columns)
        .axis(orient="top", labelAngle=0 if len(columns) <= _FEW_DOMAINS else -40),
    )  # fmt: skip
    tiles = base.mark_rect().encode(color=_tile_colour(largest))
    numbers = _tile_numbers(base)
    fits = {"raw": "raw", "unigram": "calibration fitted"}
    step = 66 if len(columns) <= _FEW_DOMAINS else 40
    panels = [
        alt.layer(tiles, numbers)
        .encode(
            y=alt.Y("row:N", title=None, sort=rows).axis(labels=fit == "raw", ticks=False, labelLimit=260)
        )
        .transform_filter(f"datum.fit === '{fit}'")
        .properties(width=alt.Step(step), height=alt.Step(24), title=title)
        for fit, title in fits.items()
        if fit in data["fit"]
    ]
    return Figure(
        name=f"domains{suffix}",
        title="Gain on each text",
        caption="Percent fewer bits per byte than without a teacher, by text (the first is the training "
        "text): blue gains, orange loses; raw, and with temperature and unigram mixture fitted to every "
        f"model on the validation split. Means over {words.seeds(verdicts)}, test split."
        + words.grey_note(verdicts),
        spoken=f"Heat maps of gains for {len(rows)} pairs of teacher and arm on {len(columns)} texts.",
        chart=alt.hconcat(*panels, data=inline(data), spacing=18),
        data=data.drop("row"),
    )


def _gain_rows(verdicts: Sequence[Verdict]) -> pl.DataFrame:
    """Gains of constant alphas with their intervals, by side."""
    rows = []
    for v in verdicts:
        sides = {side: v.gains["raw", side] for side in ("in_domain", "out_of_domain")}
        named = {_SIDES[side]: estimate for side, estimate in sides.items()}
        if v.fitted is not None:
            named["out of domain, fitted"] = v.fitted
        for side, e in named.items():
            where = {"teacher": v.teacher, "side": side, "alpha": v.alpha}
            rows.append(where | _drawn(e) | {"n_seeds": v.n_seeds})
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("low", "high"), pl.Float64))


def _drawn(estimate: Estimate) -> dict[str, float | None]:
    """The columns of an estimate; one seed has no bar."""
    ends = (estimate.low, estimate.high) if words.is_judged(estimate) else (None, None)
    return dict(zip(("gain", "low", "high"), (estimate.mean, *ends), strict=True))


def _tile_colour(largest: float) -> alt.Color:
    """Orange to blue by gain, grey where there is one seed."""
    scale = alt.Scale(domain=[-largest, 0, largest], range=_TILES)
    return alt.Color("gain:Q", legend=None, scale=scale, condition=one_seed(_UNJUDGED))


def _tile_numbers(base: alt.Chart) -> alt.Chart:
    """The gain on each tile; never `-0.0`."""
    rounded = base.transform_calculate(shown="round(datum.gain * 10) / 10 + 0")
    numbers: alt.Chart = rounded.mark_text(fontSize=10, color="#111").encode(
        text=alt.Text("shown:Q", title="gain", format="+.1f")
    )
    return numbers


def _with_origin(data: pl.DataFrame) -> pl.DataFrame:
    """The same with the origin of each line: no teacher, no gain."""
    zero = pl.lit(0.0)
    origin = data.unique(["teacher", "side"], keep="first", maintain_order=True).with_columns(
        alpha=zero, gain=zero, low=zero, high=zero
    )
    return pl.concat([origin, data]).sort("side", "teacher", "alpha", maintain_order=True)
