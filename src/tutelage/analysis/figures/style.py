"""Style figures and save them as files.

Text and axes take the colour of the page (`currentColor`), so that a chart reads on light and on dark;
series take Okabe and Ito's palette, which colour-blind readers can tell apart. Controls are grey, dashed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import polars as pl
import vl_convert
from altair.utils.schemapi import debug_mode

from tutelage.analysis.stats import on_front
from tutelage.analysis.words import NO_TEACHER
from tutelage.files import atomic_write, own_directory, write_json, write_text
from tutelage.records import UnreadableError, read_model

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from tutelage.analysis.verdicts import PairFinding

INK = "currentColor"
GREY = "#8a8a8a"
PALETTE = ("#D55E00", "#0090D8", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, the blue a little lighter so that it also shows on a dark page."""
_FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
"""One set of metrics: labels are placed here by the width that the browser will give them."""
_PNG_SCALE = 2.0
_FARTHEST = -10.0
"""Percent: losses beyond it are left out of a drawing, where they would squeeze the rest."""
_WHITE = '><rect width="100%" height="100%" fill="white"/>'
_FAINT_LINE = re.compile(r'(aria-roledescription="line mark"[^>]*) opacity=')
"""A line has nothing but its stroke; resvg draws it ten times faster where the opacity is the stroke's."""
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "padding": {"left": 14, "right": 14, "top": 4, "bottom": 4},
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
_RELATIONS = ("weak-to-strong", "same-level", "strong-to-weak")
_GREYS = (GREY, "#b59f7b")
_DASHES = ([5, 3], [2, 2])
_GREY_DASHES = ([1, 0], [9, 3], [1, 3], [9, 3, 2, 3])
"""Of teachers that are not judged and have no colour."""
_LINE_LEGEND = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, symbolOpacity=1)
_POINT_LEGEND = alt.Legend(symbolType="circle", symbolOpacity=1)


@dataclass(frozen=True, eq=False)
class Figure:
    """A chart with what a reader needs beside it.

    Attributes:
        name: file name without suffix.
        title: what is shown.
        caption: how to read it, and how many runs are behind it.
        spoken: the figure in a sentence or two, for readers who cannot see it.
        chart: the Altair chart.
        data: the numbers behind it.
        folded: whether a page shows its title alone until it is asked for.
    """

    name: str
    title: str
    caption: str
    spoken: str
    chart: alt.TopLevelMixin
    data: pl.DataFrame
    folded: bool = False


def save_all(figures: Sequence[Figure], directory: Path) -> dict[str, str]:
    """Write name.svg, name.png (white background) and name.csv of every figure to `directory`.

    Those of an earlier report that are not written again are removed; other files stay. .files.json says
    which are ours.

    Returns:
        SVG text by figure name; the same charts always give the same text.

    Raises:
        UserError: the directory cannot be written.
    """
    drawings: dict[str, str] = {}
    listing = own_directory(directory) / ".files.json"
    ours = {f"{figure.name}.{kind}" for figure in figures for kind in ("svg", "png", "csv")}
    earlier = _listed(listing) - ours
    write_json(listing, sorted(ours | earlier))  # if this process is killed, the next knows them all
    for figure in figures:
        spec = figure.chart.to_dict(validate=False) | {"config": _CONFIG}
        drawings[figure.name] = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
        write_text(directory / f"{figure.name}.svg", drawings[figure.name])
        page = drawings[figure.name].replace(">", _WHITE, 1)  # inside the svg element, under all else
        page = _FAINT_LINE.sub(r"\1 stroke-opacity=", page)
        with atomic_write(directory / f"{figure.name}.png") as partial:
            partial.write_bytes(vl_convert.svg_to_png(page, scale=_PNG_SCALE))
        write_text(directory / f"{figure.name}.csv", figure.data.write_csv())
    for path in (directory / name for name in earlier):
        if path.is_file():
            path.unlink()
    write_json(listing, sorted(ours))
    return drawings


def _listed(path: Path) -> set[str]:
    """The files of an earlier report; none where the list is missing or damaged."""
    try:
        return {name for name in read_model(path, list[str]) if Path(name).name == name}
    except UnreadableError:
        return set()


def inline(data: pl.DataFrame) -> alt.InlineData:
    """The rows inside the chart, with no limit on their number, and not held against a schema one by one.

    They are a tuple because Altair copies a list, row by row, with every chart that it layers.
    """
    with debug_mode(False):
        return alt.InlineData(values=tuple(data.to_dicts()))


def zero_line(axis: Literal["x", "y"]) -> alt.Chart:
    """A thin line where `axis` ("x" or "y") is zero."""
    rule = alt.Chart(alt.InlineData(values=[{}])).mark_rule(color=INK, opacity=0.5)
    line: alt.Chart = rule.encode(x=alt.datum(0)) if axis == "x" else rule.encode(y=alt.datum(0))
    return line


def one_seed(colour: str) -> dict[str, str]:
    """A condition for a colour: `colour` where the row has one seed, which is shown and not judged."""
    return {"test": "datum.n_seeds < 2", "value": colour}


@dataclass(frozen=True)
class Key:
    """What colour and dash a teacher has, the same in every figure of a student.

    Attributes:
        series: name in the legend, by teacher.
        colours: by name in the legend, in its order.
        dashes: likewise; controls are dashed.
    """

    series: Mapping[str | None, str]
    colours: Mapping[str, str]
    dashes: Mapping[str, list[int]]

    def only(self, series: Collection[str]) -> Key:
        """The same with fewer entries in the legend."""
        colours = {name: colour for name, colour in self.colours.items() if name in series}
        return Key(self.series, colours, {name: self.dashes[name] for name in colours})

    def colour(self, *, points: bool = False) -> alt.Color:
        """Colour by the column `series`, with lines or points in the legend; grey where there is one seed."""
        scale = alt.Scale(domain=[*self.colours], range=[*self.colours.values()])
        legend = _POINT_LEGEND if points else _LINE_LEGEND
        return alt.Color("series:N", title=None, scale=scale, legend=legend, condition=one_seed(GREY))

    def dash(self) -> alt.StrokeDash:
        """Dash by the column `series`."""
        scale = alt.Scale(domain=[*self.dashes], range=[*self.dashes.values()])
        return alt.StrokeDash("series:N", title=None, scale=scale, legend=_LINE_LEGEND)


def key_of(pairs: Sequence[PairFinding], *, with_baseline: bool = False) -> Key:
    """A colour for each teacher; where there are more than colours, one for each measured relation.

    Teachers of which nothing is judged are grey.
    """
    real = [pair for pair in pairs if not pair.teacher.control]
    many = len(real) > len(PALETTE)
    names = {
        pair.teacher.name: (pair.relation or "not measured") if many else pair.teacher.name for pair in real
    }
    order = [*_RELATIONS, "not measured"] if many else [*names.values()]
    used = [name for name in order if name in names.values()]
    controls = {pair.teacher.name: pair.teacher.name for pair in pairs if pair.teacher.control}
    judged = {names[p.teacher.name] for p in real if p.best is not None and p.best.judged}
    colours = {name: PALETTE[i] if name in judged else GREY for i, name in enumerate(used)}
    colours |= {name: _GREYS[i % len(_GREYS)] for i, name in enumerate(controls)}
    dashes = {name: [1, 0] if name in judged else _GREY_DASHES[i % 4] for i, name in enumerate(used)}
    dashes |= {name: _DASHES[i % len(_DASHES)] for i, name in enumerate(controls)}
    if with_baseline:
        colours, dashes = {NO_TEACHER: INK} | colours, {NO_TEACHER: [1, 0]} | dashes
    series: dict[str | None, str] = {None: NO_TEACHER}
    series.update(names | controls)
    return Key(series, colours, dashes)


def within_reach(data: pl.DataFrame, *columns: str) -> tuple[pl.DataFrame, str]:
    """The rows whose losses a figure can show without flattening the others, and a sentence on the rest.

    Args:
        data: rows of a figure.
        columns: gains in percent.
    """
    near = data.filter(*(pl.col(column) > _FARTHEST for column in columns))
    if near.is_empty() or near.height == data.height:
        return data, ""
    rest = data.height - near.height
    return near, f" Losses beyond {-_FARTHEST:g}% are not drawn ({rest} of {data.height})."


def label_front(base: alt.Chart, names: Sequence[str], points: Sequence[tuple[float, float]]) -> alt.Chart:
    """Name the points that no other point beats on one coordinate without losing on the other.

    Args:
        base: encodes x and y; its data has a column `name`.
        names: of the points.
        points: their coordinates.
    """
    on = [name for name, is_on in zip(names, on_front(points), strict=True) if is_on]
    text = base.mark_text(dy=-10, fontSize=10, align="center").encode(
        text="name:N", color=alt.value(INK), detail="name:N"
    )
    labels: alt.Chart = text.transform_filter(alt.FieldOneOfPredicate(field="name", oneOf=on))
    return labels
