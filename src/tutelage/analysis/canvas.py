"""How every figure looks, and how it becomes files.

Text and axes take the colour of the page (`currentColor`), so that a chart reads on light and on dark;
series take Okabe and Ito's palette, which colour-blind readers can tell apart. Controls are grey, dashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import vl_convert

from tutelage.files import new_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl

    from tutelage.study.results import Results

INK = "currentColor"
GREY = "#8a8a8a"
PALETTE = ("#D55E00", "#0090D8", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, the blue a little lighter so that it also shows on a dark page."""
NO_TEACHER = "no teacher"
_FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
"""One set of metrics: labels are placed here by the width that the browser will give them."""
_PNG_SCALE = 2.0
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "title": {"color": INK, "fontSize": 13, "fontWeight": 600, "anchor": "start"},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": 400,
        "domainColor": INK,
        "domainOpacity": 0.4,
        "tickColor": INK,
        "tickOpacity": 0.4,
        "gridColor": INK,
        "gridOpacity": 0.1,
        "tickCount": 6,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "orient": "top",
        "columnPadding": 16,
    },
}
_LINE_LEGEND = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, symbolOpacity=1)


@dataclass(frozen=True, eq=False)
class Figure:
    """A chart with what a reader needs beside it.

    Attributes:
        name: file name without suffix.
        title: what is shown.
        caption: how to read it, and how many runs are behind it.
        spoken: the figure in a sentence or two, for who cannot see it.
        chart: the Altair chart.
        data: the numbers behind it.
    """

    name: str
    title: str
    caption: str
    spoken: str
    chart: alt.TopLevelMixin
    data: pl.DataFrame


def save_all(figures: Sequence[Figure], directory: Path) -> dict[str, str]:
    """Replace `directory` by name.svg, name.png (white background) and name.csv of every figure.

    Returns:
        SVG text by figure name; the same charts always give the same text.

    Raises:
        UserError: the directory cannot be written.
    """
    drawings: dict[str, str] = {}
    with new_directory(directory) as partial:
        for figure in figures:
            spec = figure.chart.to_dict() | {"config": _CONFIG}
            drawings[figure.name] = vl_convert.vegalite_to_svg(spec)
            (partial / f"{figure.name}.svg").write_text(drawings[figure.name], encoding="utf-8")
            page = spec | {"background": "white"}
            (partial / f"{figure.name}.png").write_bytes(vl_convert.vegalite_to_png(page, scale=_PNG_SCALE))
            figure.data.write_csv(partial / f"{figure.name}.csv")
    return drawings


def inline(data: pl.DataFrame) -> alt.InlineData:
    """The rows inside the chart, with no limit on their number."""
    return alt.InlineData(values=data.to_dicts())


def zero_line(axis: Literal["x", "y"]) -> alt.Chart:
    """A thin line where `axis` ("x" or "y") is zero."""
    rule = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=INK, opacity=0.5)
    line: alt.Chart = rule.encode(x=alt.datum(0)) if axis == "x" else rule.encode(y=alt.datum(0))
    return line


def teacher_colour(results: Results, *, with_baseline: bool = False) -> alt.Color:
    """Colour by teacher, the same in every figure."""
    colours = _by_teacher(results, [*PALETTE], GREY)
    if with_baseline:
        colours = {NO_TEACHER: INK} | colours
    scale = alt.Scale(domain=[*colours], range=[*colours.values()])
    return alt.Color("teacher:N", title=None, scale=scale, legend=_LINE_LEGEND)


def teacher_dash(results: Results, *, with_baseline: bool = False) -> alt.StrokeDash:
    """Controls are dashed."""
    dashes = _by_teacher(results, [[1, 0]], [5, 3])
    if with_baseline:
        dashes = {NO_TEACHER: [1, 0]} | dashes
    scale = alt.Scale(domain=[*dashes], range=[*dashes.values()])
    return alt.StrokeDash("teacher:N", title=None, scale=scale, legend=_LINE_LEGEND)


def _by_teacher(results: Results, real: Sequence[Any], control: object) -> dict[str, Any]:
    """Values by teacher name: real teachers take `real` in turn, controls `control`."""
    names = [teacher.name for teacher in results.plan.teachers if not teacher.control]
    values = {name: real[i % len(real)] for i, name in enumerate(names)}
    return {t.name: values.get(t.name, control) for t in results.plan.teachers}
