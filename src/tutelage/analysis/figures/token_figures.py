"""Draw a token comparison; each figure has its caption and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from tutelage.analysis.figures.style import GREY, INK, PALETTE, Figure, inline, zero_line
from tutelage.analysis.words import sorting, untaught

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tutelage.study.token_tables import TokenComparison

_GAIN, _LEAD = "gain of the student", "lead of the teacher"
_MODELS = {"student": PALETTE[0], "teacher": PALETTE[1], "baseline": GREY}
_PAIRS = {
    "student, teacher": PALETTE[0],
    "student, baseline": PALETTE[1],
    "teacher, baseline": GREY,
}
_ALONE = {
    "entropy": "entropy (nats)",
    "max_prob": "largest probability",
    "gold_logp": "log p of the token (nats)",
    "gold_rank": "rank of the token",
    "above_uniform": "tokens above 1/V",
    "top10_mass": "mass of the top 10",
    "top50_mass": "mass of the top 50",
}
_TOGETHER = {
    "kl": "KL(first || second) (nats)",
    "reverse": "KL(second || first) (nats)",
    "js": "Jensen-Shannon (nats)",
    "top1_agreement": "same first choice",
    "top5_overlap": "overlap of the top 5",
    "top10_spearman": "rank correlation, top 10",
    "shared_mass": "sum of min(p, q)",
}
_COLUMNS = 4


def comparison_figures(found: TokenComparison) -> list[Figure]:
    """Gain by difficulty, by position and by who is right; the models alone; the models in pairs."""
    return [
        by_entropy(found),
        by_position(found),
        who_is_right(found),
        _multiples(found, "models", "The models one by one", _ALONE, _MODELS, "One line per model."),
        _multiples(
            found,
            "pairs",
            "The models in pairs",
            _TOGETHER,
            _PAIRS,
            "One line per pair; first and second are in the order of the legend.",
        ),
    ]


def by_entropy(found: TokenComparison) -> Figure:
    """Gain of the student and lead of the teacher in fifths of baseline entropy."""
    data = _gains(found, "entropy")
    return Figure(
        name="entropy",
        title="Gain by difficulty",
        caption="Cross-entropy of the baseline less that of the student (left) and of the teacher (right), "
        f"in fifths of the {untaught(found)}'s entropy, easiest tokens first. {sorting(found)} "
        f"{_bars(found)}",
        spoken=f"Gain by fifth of {untaught(found)} entropy. {_spoken(data)}",
        chart=alt.hconcat(*(_points(data, s, f"{untaught(found)} entropy (nats)") for s in (_GAIN, _LEAD))),
        data=data,
    )


def by_position(found: TokenComparison) -> Figure:
    """Gain of the student and lead of the teacher along the context."""
    data = _gains(found, "position").with_columns(middle=(pl.col("low") + pl.col("high")) / 2)
    panels = []
    for side, colour in ((_GAIN, PALETTE[0]), (_LEAD, PALETTE[1])):
        base = alt.Chart(inline(data.filter(pl.col("side") == side))).encode(
            x=alt.X("middle:Q", title="position in the context (tokens)", axis=alt.Axis(grid=False))
        )
        band = base.mark_area(opacity=0.25, color=colour).encode(
            y=alt.Y("low95:Q", title="nats per token"), y2="high95:Q"
        )
        line = base.mark_line(strokeWidth=2, color=colour, point=alt.OverlayMarkDef(size=25, color=colour))
        layers = alt.layer(zero_line("y"), band, line.encode(y="mean:Q"))
        panels.append(layers.properties(width=280, height=220, title=side))
    return Figure(
        name="position",
        title="Gain by position",
        caption="The same two differences in twentieths of the context. Bands are 95% intervals over "
        f"documents; {_scope(found)}.",
        spoken=f"Gain by position in the context. {_spoken(data)}",
        chart=alt.hconcat(*panels),
        data=data,
    )


def who_is_right(found: TokenComparison) -> Figure:
    """Gain of the student by who is right on the first choice, and by who is closer to the token."""
    data = _gains(found, "right", "closer").filter(pl.col("side") == _GAIN)
    top = max(0.0, float(data["high95"].fill_null(data["mean"]).to_numpy().max()))
    panels = []
    for grouping, title in (("right", "whose first choice is right"), ("closer", "who gives the token more")):
        rows = data.filter(pl.col("grouping") == grouping).with_columns(
            note=pl.col("share").map_elements(lambda share: f"{share:.0%}", return_dtype=pl.String)
        )
        base = alt.Chart(inline(rows)).encode(
            x=alt.X("label:N", title=title, sort=rows["label"].to_list(), axis=alt.Axis(labelAngle=0))
        )
        layers = alt.layer(
            base.mark_bar(width={"band": 0.6}, color=PALETTE[0], opacity=0.75).encode(
                y=alt.Y("mean:Q", title="gain (nats per token)")
            ),
            base.mark_rule(strokeWidth=1.5, color=INK).encode(y="low95:Q", y2="high95:Q"),
            base.mark_text(dy=-9, fontSize=11, color=INK).encode(y=alt.datum(top), text="note:N"),
            zero_line("y"),
        )
        panels.append(layers.properties(width=90 * len(rows), height=240))
    return Figure(
        name="right",
        title="Who is right",
        caption=f"Gain of the student where only the teacher, only the {untaught(found)}, both or neither "
        f"would have guessed the token, and where the teacher gives it more probability than the "
        f"{untaught(found)} or not; above, the share of tokens. {sorting(found)} {_bars(found)}",
        spoken=f"Gain by who is right. {_spoken(data)}",
        chart=alt.hconcat(*panels).resolve_scale(y="shared"),
        data=data,
    )


def _gains(found: TokenComparison, *groupings: str) -> pl.DataFrame:
    """Both differences in some groupings, and the share of tokens of every cell."""
    sides = [(_GAIN, "student"), (_LEAD, "teacher")]
    rows = [found.of("gain", of, *groupings).with_columns(side=pl.lit(side)) for side, of in sides]
    return pl.concat(rows).drop("quantity", "of").with_columns(share=pl.col("n") / found.tokens)


def _points(data: pl.DataFrame, side: str, title: str) -> alt.LayerChart | alt.FacetChart:
    rows = data.filter(pl.col("side") == side)
    colour = PALETTE[0] if side == _GAIN else PALETTE[1]
    base = alt.Chart(inline(rows)).encode(
        x=alt.X("label:N", title=title, sort=rows["label"].to_list(), axis=alt.Axis(labelAngle=0))
    )
    return alt.layer(
        zero_line("y"),
        base.mark_rule(strokeWidth=1.5, color=colour).encode(
            y=alt.Y("low95:Q", title="nats per token"), y2="high95:Q"
        ),
        base.mark_line(strokeWidth=1, opacity=0.5, color=colour).encode(y="mean:Q"),
        base.mark_point(filled=True, size=60, opacity=1, color=colour).encode(y="mean:Q"),
    ).properties(width=380, height=220, title=side)


def _multiples(
    found: TokenComparison,
    name: str,
    title: str,
    quantities: Mapping[str, str],
    colours: Mapping[str, str],
    caption: str,
) -> Figure:
    """One small panel per quantity, in fifths of baseline entropy."""
    shown = found.groups.filter(pl.col("grouping") == "entropy").with_columns(fifth=pl.col("bin") + 1)
    data = _named(shown).filter(pl.col("quantity").is_in([*quantities]), pl.col("of").is_in([*colours]))
    colour = alt.Color("of:N", title=None).scale(domain=[*colours], range=[*colours.values()])
    panels = []
    for quantity, text in quantities.items():
        base = alt.Chart(inline(data.filter(pl.col("quantity") == quantity))).encode(
            x=alt.X("fifth:O", title=f"fifth of {untaught(found)} entropy", axis=alt.Axis(labelAngle=0)),
            color=colour,
        )
        rule = base.mark_rule(strokeWidth=1.5).encode(
            y=alt.Y("low95:Q", title=None, scale=alt.Scale(zero=False)), y2="high95:Q"
        )
        line = base.mark_line(strokeWidth=1.5, point=True).encode(y="mean:Q")
        panels.append(alt.layer(rule, line).properties(width=150, height=130, title=text))
    return Figure(
        name=name,
        title=title,
        caption=f"{caption} Means in fifths of the {untaught(found)}'s entropy, easiest tokens first. "
        f"{_bars(found)}",
        spoken=f"{title}: {', '.join(quantities.values())}, by fifth of {untaught(found)} entropy.",
        chart=alt.concat(*panels, columns=_COLUMNS),
        data=data,
    )


def _named(cells: pl.DataFrame) -> pl.DataFrame:
    """Pairs by the names of the legend; KL the other way round is a quantity of its own."""
    pairs = [pair.split(", ") for pair in _PAIRS]
    forward = {f"{first}.{second}": f"{first}, {second}" for first, second in pairs}
    backward = {f"{second}.{first}": f"{first}, {second}" for first, second in pairs}
    is_backward = pl.col("of").is_in([*backward])
    return cells.with_columns(
        quantity=pl.when(is_backward).then(pl.lit("reverse")).otherwise(pl.col("quantity")),
        of=pl.col("of").replace(forward | backward),
    )


def _bars(found: TokenComparison) -> str:
    return f"Bars are 95% intervals over documents; {_scope(found)}."


def _scope(found: TokenComparison) -> str:
    return f"{found.text}, {found.tokens:,} tokens of {found.documents:,} documents"


def _spoken(data: pl.DataFrame) -> str:
    cells = data.select("side", "label", "mean").iter_rows()
    return "; ".join(f"{side}, {label}: {mean:+.3f}" for side, label, mean in cells) + "."
