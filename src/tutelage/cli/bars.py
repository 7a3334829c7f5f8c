"""Show progress: rows in a terminal, lines in a log file; print the results of a command."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.segment import Segment

from tutelage import processes
from tutelage.cli.stages import Stage, rows
from tutelage.cli.streams import silence
from tutelage.errors import UserError, without_controls
from tutelage.files import NO_SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Self

    from rich.console import ConsoleOptions, RenderableType
    from rich.table import Table

LOG_SECONDS = "TUTELAGE_LOG_SECONDS"
"""Environment variable: seconds between lines where there is no terminal; 0 for none."""

_DEFAULT_SECONDS = 30.0
_FIRST_SECONDS = 2.0
_CELL_SECONDS = 0.5
_ANY_WIDTH = 10_000
"""More columns than a table has: what it asks for is not bounded by the terminal's."""


class _Terminal(Console):
    """A console on which what it is given stands as it is, and which never ends the work.

    Its reader may leave, and the disk of a log file may be full. Names of files that came from elsewhere are
    shown and not obeyed.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        # Square brackets and colons in a path are no markup and no emoji.
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def print(self, *objects: object, **options: Any) -> None:  # noqa: ANN401 - as rich has them
        """Print as rich does; nothing more once there is no space left for it."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self.on_broken_pipe()

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, which itself lets escape sequences in a text through."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Print nothing more; the work is done to its end."""
        self.quiet = True
        silence(sys.stderr if self.stderr else sys.stdout)


out = _Terminal()
err = _Terminal(stderr=True)


def say(label: str, text: object) -> None:
    """Print a line of a command's result: what it is, and the value; once for all processes.

    A path below the working directory is shown from there, however it was found.
    """
    if isinstance(text, Path) and text.is_relative_to(here := Path.cwd()):
        text = text.relative_to(here)
    if processes.place().is_main:
        out.print(f"{label:<8} {text}", soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table, or where it is wider than the terminal its rows as text, so that no number is cut."""
    if Measurement.get(out, out.options.update(width=_ANY_WIDTH), table).maximum <= out.width:
        out.print(table)
        return
    from tutelage.analysis.report.report_table import as_items

    headings = [str(column.header).strip() for column in table.columns]
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    for text in as_items(headings, [*zip(*columns, strict=True)], out.width):
        out.print(text)
    if table.caption is not None:
        out.print(table.caption)


class _Cell:
    """The rows in the output of a notebook's cell. There rich's own `Live` would need `ipywidgets`."""

    def __init__(self, draw: Callable[[], Group]) -> None:
        from IPython.display import DisplayHandle

        self._draw = draw
        self._handle = DisplayHandle()
        self._drawn = -math.inf

    def start(self) -> None:
        """Show them for the first time, above what the cell prints later."""
        self._handle.display(self._text(), raw=True)

    def refresh(self) -> None:
        """Draw them anew in their place, if it is time for it."""
        if time.monotonic() - self._drawn >= _CELL_SECONDS:
            self._handle.update(self._text(), raw=True)

    def stop(self) -> None:
        """Clear them."""
        self._handle.update({"text/plain": ""}, raw=True)

    def _text(self) -> dict[str, str]:
        self._drawn = time.monotonic()
        rows = (str(row) for row in self._draw().renderables)
        return {"text/plain": without_controls("\n".join(rows))}  # as `_Terminal` does; a cell obeys them too


class RichProgress:
    """A `tutelage.progress.Progress` on standard error: in a terminal rows per stage, gone when it ends.

    In a notebook the rows stand in the output of the cell. Elsewhere, as in a log file, a line every
    `LOG_SECONDS` says how far the stage is that began first. Everywhere a note or the end of a stage is a
    line. Of the processes of one job only the first prints. A context manager.

    Raises:
        UserError: `LOG_SECONDS` is no number.
    """

    def __init__(self) -> None:
        self._prints = processes.place().is_main
        self._every = _log_seconds()
        self._stages: dict[str, Stage] = {}
        self._last, self._seen = 0.0, ""
        self._rows: Live | _Cell | None = None
        if err.is_terminal and self._prints:
            self._rows = Live(get_renderable=self._screen, console=err, transient=True, refresh_per_second=5)
        elif err.is_jupyter and self._prints:
            self._rows = _Cell(self._screen)

    def __enter__(self) -> Self:
        self.start("preparing")
        if self._rows is not None:
            self._rows.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rows is not None:
            self._rows.stop()

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        """Add a stage."""
        self._stages.pop("preparing", None)
        self._stages.pop(stage, None)
        self._stages[stage] = Stage(stage, total, unit, done, done)

    def advance(self, stage: str, done: float) -> None:
        """Say how much is done."""
        self._stages[stage].done = done
        self._show(stage)

    def describe(self, stage: str, figures: Mapping[str, float | str]) -> None:
        """Show figures."""
        self._stages[stage].figures = figures
        self._show(stage)

    def finish(self, stage: str, outcome: str = "done") -> None:
        """Remove a stage and print a line instead."""
        ended = self._stages.pop(stage, None)
        self.note(f"{stage}: {outcome}" + ("" if ended is None else f" · {ended.summary(ended=True)}"))

    def note(self, text: str) -> None:
        """Print a line above the rows."""
        if self._prints:
            err.print(text, soft_wrap=True)

    def _show(self, stage: str) -> None:
        if isinstance(self._rows, _Cell):  # a terminal's are drawn by a thread
            self._rows.refresh()
        elif self._rows is None and self._every and stage == next(iter(self._stages)):
            self._log(stage)

    def _log(self, stage: str) -> None:
        """Print a line if it is time for one: soon after the first figures of a stage, then regularly."""
        now, one = time.monotonic(), self._stages[stage]
        if one.done == one.total:  # its end is a line
            return
        fresh = self._seen != stage and bool(one.figures)
        if now - max(one.began, 0.0 if fresh else self._last) >= (
            min(_FIRST_SECONDS, self._every) if fresh else self._every
        ):
            self._last, self._seen = now, stage
            self.note(f"{stage}: {one.summary()}")

    def _screen(self) -> Group:
        return Group(*rows([*self._stages.values()], err.width, err.height))


def _log_seconds() -> float:
    text = os.environ.get(LOG_SECONDS, "")
    try:
        seconds = float(text or _DEFAULT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{LOG_SECONDS} = {text!r}: give seconds between lines of a log, or 0 for no lines")
    return seconds
