"""Describe a table once; render it on the page (report.html.j2), in a terminal, as Markdown and as CSV."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tutelage.analysis import words
from tutelage.analysis.stats import Estimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

_EFFECTS = {"helps": "helps", "hurts": "hurts", words.NOT_JUDGED: "soft"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        heading: for people; None where only programs read it.
        key: its name in CSV; None where only people read it.
        style: CSS class of its cells on the page; "row" where they are the headings of their rows.
        estimate: whether its values are estimates, which CSV has in four columns.
    """

    heading: str | None
    key: str | None = None
    style: str = ""
    estimate: bool = False


@dataclass(frozen=True, slots=True)
class TableCell:
    """A cell of a table.

    Attributes:
        text: for people.
        note: more, smaller and below it on the page.
        effect: CSS class of the text: helps, hurts, unclear or soft.
        value: for programs.
    """

    text: str = ""
    note: str = ""
    effect: str = ""
    value: object = None


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table.

    Attributes:
        label: what it is.
        columns: in order.
        rows: one cell for each column, or text that is one.
    """

    label: str
    columns: tuple[Column, ...]
    rows: list[list[TableCell | str]]

    @property
    def headings(self) -> list[str]:
        """Headings of what people see."""
        return [column.heading for column in self.columns if column.heading is not None]

    @property
    def shown(self) -> list[list[tuple[str, TableCell]]]:
        """(style, cell) of what people see, by row."""
        return [
            [
                (column.style, TableCell(cell) if isinstance(cell, str) else cell)
                for column, cell in zip(self.columns, row, strict=True)
                if column.heading is not None
            ]
            for row in self.rows
        ]

    def print_on(self, console: Console, caption: str) -> None:
        """Print it in a terminal, its label above and a caption below.

        Where it is too wide, the widest cell of each row stands below the others; where it still is, all
        cells of a row follow one another, each after its heading.
        """
        rows = [[cell.text for _, cell in row] for row in self.shown]
        columns = [max(map(len, column)) for column in zip(self.headings, *rows, strict=True)]
        if sum(columns) + 2 * len(columns) > console.width:
            for line in filter(None, [self.label, *self._narrow(rows, columns, console.width), caption]):
                console.print(Text(line))
            return
        title = Text(self.label) if self.label else None
        table = Table(title=title, caption=Text(caption), box=None, caption_justify="left")
        for heading in self.headings:
            table.add_column(heading)
        for row in self.shown:
            table.add_row(*(Text(cell.text) for _, cell in row))
        console.print(table)

    def _narrow(self, rows: Sequence[Sequence[str]], columns: Sequence[int], width: int) -> list[str]:
        """Lines of at most `width` characters; `columns` has the widths of the columns."""
        widest = max(range(len(columns)), key=lambda i: (columns[i], i))
        rest = [i for i in range(len(columns)) if i != widest]
        if sum(columns[i] for i in rest) + 2 * (len(rest) - 1) <= width:

            def beside(cells: Sequence[str]) -> str:
                return "  ".join(f"{cells[i]:{columns[i]}}" for i in rest).rstrip()

            below = [
                [beside(row), textwrap.indent(textwrap.fill(row[widest], width - 4), "    ")] for row in rows
            ]
            return [beside(self.headings), *itertools.chain.from_iterable(below)]
        return as_items(self.headings, rows, width)

    def markdown(self) -> str:
        """Markdown, as the README has it; notes stand below what they are of."""
        escaped = [
            ["<br>".join(filter(None, (cell.text, cell.note))).replace("|", "\\|") for _, cell in row]
            for row in self.shown
        ]
        lines = [self.headings, ["---"] * len(self.headings), *escaped]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def records(self) -> list[dict[str, Any]]:
        """The values of the columns that have a key, by key."""
        found: list[dict[str, Any]] = []
        for row in self.rows:
            record: dict[str, Any] = {}
            for column, cell in zip(self.columns, row, strict=True):
                value = cell.value if isinstance(cell, TableCell) else cell
                if column.key is not None and column.estimate:
                    record |= estimate_record(column.key, value if isinstance(value, Estimate) else None)
                elif column.key is not None:
                    record[column.key] = value
            found.append(record)
        return found


def as_items(headings: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[str]:
    """Rows as text of at most `width` characters a line: each cell that has something after its heading."""
    items = (
        " · ".join(f"{name} {cell}".strip() for name, cell in zip(headings, row, strict=True) if cell)
        for row in rows
    )
    return [textwrap.fill(line, width, subsequent_indent="    ") for line in items]


def estimate_record(key: str, estimate: Estimate | None) -> dict[str, Any]:
    """The CSV columns of an estimate; of one seed there is no interval, so its ends are empty."""
    names = (key, f"{key}_low", f"{key}_high", f"{key}_n")
    if estimate is None:
        return dict.fromkeys(names)
    ends = (estimate.low, estimate.high) if words.is_judged(estimate) else (None, None)
    return dict(zip(names, (estimate.mean, *ends, estimate.n), strict=True))


def gain_cell(estimate: Estimate | None) -> TableCell:
    """A gain with its interval, coloured by whether it helps."""
    if estimate is None:
        return TableCell("none", effect="soft")
    effect = _EFFECTS.get(words.effect(estimate), "unclear")
    return TableCell(words.signed(estimate.mean, 2), words.span(estimate), effect, estimate)
