"""Describe stages of work: how far, how fast, how long; as rows that fit a terminal, as lines of a log."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.text import Text

from tutelage.files import short, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FORMATS = {
    "done": "{} done",
    "failed": "{} failed",
    "running": "{} running",
    "where": "{}",
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

_NOTABLE = {"data_wait": 0.05, "skipped_steps": 1}
"""Figures that are shown from some value on."""

_WIDE = 100
"""Columns of a terminal from which on bars have their full length."""


def period(seconds: float) -> str:
    """Format a length of time: "12 s", "3.4 min", "5.6 h", "9.5 days"."""
    if seconds < 100:  # noqa: PLR2004 - two digits
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 360_000:  # noqa: PLR2004 - the same
        return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004 - the same
    return f"{seconds / 86400:,.1f} days"


@dataclass(slots=True)
class Stage:
    """A stage that has begun.

    Attributes:
        name: as people read it.
        total: amount of work; None if it is not known.
        unit: of the amounts.
        before: amount that was finished earlier.
        done: amount that is finished.
        figures: measured, by name; "seconds_left" stands in for the estimate from the speed, nan for none.
        began: on the monotonic clock.
    """

    name: str
    total: float | None = None
    unit: str = ""
    before: float = 0.0
    done: float = 0.0
    figures: Mapping[str, float | str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since it began here."""
        return time.monotonic() - self.began

    @property
    def speed(self) -> float:
        """Amount per second since it began here."""
        return (self.done - self.before) / max(self.elapsed, 1e-9)

    @property
    def times(self) -> list[str]:
        """Time since it began, and about how long it still takes if that can be told."""
        left = math.nan
        if "seconds_left" in self.figures:
            left = float(self.figures["seconds_left"])
        elif self.total is not None and self.speed > 0:
            left = max(0.0, self.total - self.done) / self.speed
        return [period(self.elapsed), *([] if math.isnan(left) else [f"{period(left)} left"])]

    @property
    def amount(self) -> str:
        """What is done, of how much."""
        return _amount(self.done, self.total, self.unit)

    @property
    def measured(self) -> list[str]:
        """The figures in words, the most important first."""
        parts = []
        if self.unit not in ("", "steps") and "tokens_per_second" not in self.figures and self.speed > 0:
            speed = size_text(self.speed) if self.unit == "bytes" else f"{short(self.speed)} {self.unit}"
            parts.append(f"{speed}/s")
        untaught = self.figures.get("alpha") == 0
        kd = next((name for name in self.figures if name == "kd" or name.startswith("kd_")), None)
        for name, text in _FORMATS.items():
            if untaught and name in ("kd", "alpha"):
                continue
            if name == "kd" and kd is not None:
                parts.append(text.format(kd, self.figures[kd]))
            elif name in self.figures and not (
                name in _NOTABLE and float(self.figures[name]) < _NOTABLE[name]
            ):
                parts.append(text.format(self.figures[name]))
        return parts

    def summary(self, *, ended: bool = False) -> str:
        """Amount, figures and time in one line; of a stage that has ended no time that is left."""
        times = self.times[:1] if ended else self.times
        amount = "" if ended and not self.unit else self.amount
        return " · ".join([*filter(None, [amount]), *self.measured, *times])


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == "bytes":
        return size_text(done)
    if unit == "tokens":
        return short(done) + ("" if total is None else f"/{short(total)}") + " tokens"
    if unit == "":
        return f"{done / total:.0%}" if total else ""
    return f"{done:,}" + ("" if total is None else f"/{total:,}") + f" {unit}"


def rows(stages: Sequence[Stage], width: int, height: int) -> list[Text]:
    """Draw stages on a screen of `width` by `height` characters, of which one line stays free.

    Each has its name, amount and times in a row, and as many figures as there is room for. Where there are
    few stages, figures without room stand in a row of their own below.
    """
    places = max(1, height - 1)
    shown = stages if len(stages) <= places else stages[: places - 1]
    heads = _heads(shown, width)
    roomy = 2 * len(shown) <= places
    drawn: list[Text] = []
    for stage, head in zip(shown, heads, strict=True):
        figures = stage.measured
        beside = _joined(figures, width - len(head) - 2)
        if beside == " · ".join(figures) or not roomy:
            drawn.append(Text.assemble(head, f"  {beside}" if beside else ""))
        else:
            drawn += [head, Text(f"  {_joined(figures, width - 2)}")]
    if len(shown) < len(stages):
        drawn.append(Text(f"and {len(stages) - len(shown)} more"))
    for row in drawn:
        row.no_wrap, row.overflow = True, "ellipsis"
    return drawn


def _heads(stages: Sequence[Stage], width: int) -> list[Text]:
    """Name, bar, amount and times of each stage, in columns."""
    names = [_shortened(stage.name, max(18, width * 3 // 10)) for stage in stages]
    amounts, times = [stage.amount for stage in stages], [" · ".join(stage.times) for stage in stages]
    widest = [max(map(len, texts), default=0) for texts in (names, amounts, times)]
    bar = min(12 if width >= _WIDE else 6, width - sum(widest) - 4)
    heads = []
    for stage, name, amount, time_text in zip(stages, names, amounts, times, strict=True):
        part = min(1.0, stage.done / stage.total) if stage.total else 0.0
        full = round(max(0, bar) * part)
        heads.append(
            Text.assemble(
                f"{name:{widest[0]}} ",
                ("━" * full, "green"),
                ("·" * (bar - full), "dim"),
                " " if bar > 0 else "",
                f"{amount:>{widest[1]}} {time_text:{widest[2]}}".rstrip(),
            )
        )
    return heads


def _shortened(name: str, room: int) -> str:
    """A long name without its middle: what tells it from others, such as the seed, is mostly at its end."""
    start = room // 4
    return name if len(name) <= room else f"{name[:start]}…{name[start + 1 - room :]}"


def _joined(figures: Sequence[str], room: int) -> str:
    """As many figures as fit, the first ones."""
    text = ""
    for figure in figures:
        longer = f"{text} · {figure}" if text else figure
        if len(longer) > room:
            break
        text = longer
    return text
