"""What a person sees while work goes on: progress bars and tables. No computation happens here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

out = Console()
err = Console(stderr=True)


def period(seconds: float) -> str:
    """A length of time as people say it: "12 s", "3.4 min", "5.6 h", "9.5 days"."""
    if seconds < 100:  # noqa: PLR2004 - two digits
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    if seconds < 360_000:  # noqa: PLR2004 - the same
        return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004 - the same
    return f"{seconds / 86400:,.1f} days"


def short(number: float) -> str:
    """Three digits and a unit: "950", "12.3K", "4.56M"."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5:  # noqa: PLR2004 - three digits
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


class RunBar:
    """Progress of one training run: step, speed, losses, time left. A `Watcher` and a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=out,
        )
        self._task = self._progress.add_task("preparing", total=None, measured="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, run: str, step: int, steps: int) -> None:
        """Name the run and set the bar's ends."""
        if step:
            self.note(f"going on after step {step:,} of {steps:,}")
        self._progress.reset(self._task, description=run, total=steps, completed=step)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def log(self, row: Mapping[str, float]) -> None:
        """Show the newest losses and speed."""
        text = f"loss {row['loss']:.3f} ce {row['ce']:.3f}"
        if row["alpha"] > 0:
            kd = next(name for name in row if name.split("_")[0] == "kd")
            text += f" {kd} {row[kd]:.3f} alpha {row['alpha']:.2f}"
        self._progress.update(self._task, measured=f"{text} · {row['tokens_per_second']:,.0f} tokens/s")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False)


class StoreBar:
    """Progress of a token store: stage, text read, speed. Call it with (stage, bytes); a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._stages: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int) -> None:
        """`done` bytes of text have gone through `stage`."""
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=None)
        self._progress.update(self._stages[stage], completed=done)


class TeachBar:
    """Progress of a teacher cache: tokens, speed, size, time left. A `TeachWatcher` and a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=out,
        )
        self._task = self._progress.add_task("preparing", total=None, measured="")
        self._tokens = self._before = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.update(self._task, visible=self._tokens > 0)
        self._progress.stop()

    def begin(self, cache: str, done: int, tokens: int) -> None:
        """Name the cache and set the bar's ends."""
        if done:
            self.note(f"going on after {done:,} of {tokens:,} tokens")
        self._before, self._tokens, self._start = done, tokens, time.monotonic()
        self._progress.reset(self._task, description=cache, total=tokens, completed=done)

    def advance(self, done: int, size: int) -> None:
        """Move the bar; the speed is that of all processes since this one began."""
        speed = (done - self._before) / max(time.monotonic() - self._start, 1e-9)
        measured = (
            f"{short(done)}/{short(self._tokens)} tokens · {short(speed)}/s · {size / done:.2f} bytes/token"
        )
        self._progress.update(self._task, completed=done, measured=measured)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False)


class EvalBar:
    """Progress of an evaluation: model, domain, tokens scored. An `EvalWatcher` and a context manager."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[measured]}"),
            TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task("preparing", total=None, measured="")
        self._tokens = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def store(self, stage: str, done: int) -> None:
        """`done` bytes of text have gone through `stage` of a token store."""
        self._progress.update(
            self._task, description=f"token store: {stage}", measured=f"{done / 1e6:.1f} MB"
        )

    def domain(self, subject: str, domain: str, number: int, of: int) -> None:
        """A domain begins."""
        self._progress.update(self._task, description=f"{subject}: {domain} ({number} of {of})", measured="")
        self._tokens, self._start = 0, time.monotonic()

    def advance(self, tokens: int) -> None:
        """So many more tokens are scored."""
        self._tokens += tokens
        speed = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._progress.update(self._task, measured=f"{self._tokens:,} tokens, {speed:,.0f} per second")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        err.print(text, highlight=False, soft_wrap=True)
