"""Show progress: bars in a terminal, a line for each finished stage; format times and results."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID
from rich.progress import Progress as Bars
from rich.text import Text

from tutelage import processes
from tutelage.cli.streams import silence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self


class _Terminal(Console):
    """A console on which what it is given stands as it is, and whose reader may leave while work goes on."""

    def __init__(self, *, stderr: bool = False) -> None:
        # Square brackets and colons in a path are no markup and no emoji.
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Print nothing more; the work is done to its end."""
        self.quiet = True
        silence(sys.stderr if self.stderr else sys.stdout)


out = _Terminal()
err = _Terminal(stderr=True)

_FORMATS = {
    "done": "{} done",
    "failed": "{} failed",
    "running": "running {}",
    "loss": "loss {:.3f}",
    "ce": "ce {:.3f}",
    "kd": "{} {:.3f}",
    "alpha": "alpha {:.2f}",
    "bytes_per_token": "{:.2f} bytes/token",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "data_wait": "waits {:.0%}",
    "skipped_steps": "{} skipped",
    "peak_memory_gib": "{:.1f} GiB",
}
"""Format of each figure that is shown, in their order: what matters most is seen in a narrow terminal too."""

_WIDE = 100
"""Columns of a terminal from which on bars have their full length."""
_END = 9
"""Last characters of a name that are kept: a dash and the run's hash."""

_NOTABLE = {"data_wait": 0.05, "skipped_steps": 1}
"""Figures that are shown from some value on."""


def period(seconds: float) -> str:
    """Format a length of time: "12 s", "3.4 min", "5.6 h", "9.5 days"."""
    if seconds < 100:  # noqa: PLR2004 - two digits
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 360_000:  # noqa: PLR2004 - the same
        return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004 - the same
    return f"{seconds / 86400:,.1f} days"


def short(number: float) -> str:
    """Format a number with three digits and a unit: "950", "12.3K", "4.56M"."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5:  # noqa: PLR2004 - three digits
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def say(label: str, text: object) -> None:
    """Print a line of a command's result: what it is, and the value or path; once for all processes."""
    if processes.place().is_main:
        out.print(f"{label:<8} {text}", soft_wrap=True)


class RichProgress:
    """A `tutelage.progress.Progress` in a terminal: a bar per stage, gone when it ends. A context manager.

    With or without a terminal, a note or the end of a stage is a line on standard error. Of the processes of
    one job only the first prints.
    """

    def __init__(self) -> None:
        self._prints = processes.place().is_main
        self._bars = Bars(
            _Name(),
            BarColumn(bar_width=12 if err.width >= _WIDE else 6),
            _TimeLeft(),
            _Measured(),
            console=err,
            transient=True,
            disable=not err.is_terminal or not self._prints,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.start("preparing")
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, stage: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        """Add a bar."""
        self._remove("preparing")
        self._remove(stage)
        self._tasks[stage] = self._bars.add_task(stage, total=total, unit=unit, before=done, figures={})
        self.advance(stage, done)

    def advance(self, stage: str, done: float) -> None:
        """Move a bar."""
        self._bars.update(self._tasks[stage], completed=done)

    def describe(self, stage: str, figures: Mapping[str, float | str]) -> None:
        """Show figures beside a bar."""
        self._bars.update(self._tasks[stage], figures=figures)

    def finish(self, stage: str, outcome: str = "done") -> None:
        """Remove a bar and print a line instead."""
        task = self._remove(stage)
        measured = "" if task is None else _measured(task)
        seconds = "" if task is None else f" · {period(task.elapsed or 0.0)}"
        self.note(f"{stage}: {outcome}" + (f" · {measured}" if measured else "") + seconds)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if self._prints:
            self._bars.console.print(text, soft_wrap=True)

    def _remove(self, stage: str) -> Task | None:
        if stage not in self._tasks:
            return None
        place = self._tasks.pop(stage)
        task = next(task for task in self._bars.tasks if task.id == place)
        self._bars.remove_task(place)
        return task


class _Name(ProgressColumn):
    """Name of a stage; a long one loses its middle, so that it leaves room in a narrow terminal."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        name, room = task.description, max(_END + 9, err.width * 3 // 10)
        if len(name) > room:
            name = f"{name[: room - _END - 1]}…{name[-_END:]}"
        return Text(name, no_wrap=True)


class _Measured(ProgressColumn):
    """Amount, speed and figures of a stage."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        return Text(_measured(task), no_wrap=True, overflow="ellipsis")


class _TimeLeft(ProgressColumn):
    """Time since a stage began, and about how long it still takes."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        elapsed = task.elapsed or 0.0
        left = task.fields["figures"].get("seconds_left")
        speed = _speed(task)
        if left is None and task.total is not None and speed > 0:
            left = (task.total - task.completed) / speed
        return Text(period(elapsed) if left is None else f"{period(left)} left", no_wrap=True)


def _measured(task: Task) -> str:
    figures, unit = task.fields["figures"], task.fields["unit"]
    parts = [_amount(task.completed, task.total, unit)]
    if unit in ("tokens", "bytes") and "tokens_per_second" not in figures and _speed(task) > 0:
        parts.append(f"{_amount(_speed(task), None, unit)}/s")
    untaught = figures.get("alpha") == 0
    kd = next((name for name in figures if name == "kd" or name.startswith("kd_")), None)
    for name, text in _FORMATS.items():
        if untaught and name in ("kd", "alpha"):
            continue
        if name == "kd" and kd is not None:
            parts.append(text.format(kd, figures[kd]))
        elif name in figures and figures[name] >= _NOTABLE.get(name, figures[name]):
            parts.append(text.format(figures[name]))
    return " · ".join(part for part in parts if part)


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 1e6:,.1f} MB"
    if unit == "tokens":
        return short(done) + ("" if total is None else f"/{short(total)}") + " tokens"
    if unit == "":
        return f"{done / total:.0%}" if total else ""
    return f"{done:,}" + ("" if total is None else f"/{total:,}") + f" {unit}"


def _speed(task: Task) -> float:
    """Amount per second since the stage began here."""
    before: float = task.fields["before"]
    return (task.completed - before) / max(task.elapsed or 0.0, 1e-9)
