"""What a person sees of a study: the live table of its runs, its status. No computation happens here."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from tutelage.cli.progress import out, period, short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from tutelage.study.runner import StudyProgress
    from tutelage.study.status import Status

_TAIL_BYTES = 2048


class StudyTable:
    """State of a study's runs, redrawn twice a second. A `StudyWatcher` and a context manager."""

    def __init__(self) -> None:
        self._live = Live(console=out, auto_refresh=False)
        self._start = time.monotonic()
        self._flops_at_start: float | None = None
        self._printed: set[str] = set()
        self._done_before: set[str] | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, progress: StudyProgress) -> None:
        """Draw what runs, what is done and how long the rest will take."""
        if not out.is_terminal:
            self._print_news(progress)
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("run")
        table.add_column("state")
        for name in ("done", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right")
        done_flops = 0.0
        for node in progress.nodes:
            directory = node.config.output / node.id
            flops = node.cost.total
            if node.id in progress.finished:
                done_flops += flops
                continue
            state = _state(directory)
            part = state.get("step", 0) / max(1, state.get("steps", 1))
            done_flops += part * flops
            if node.id in progress.running | progress.elsewhere:
                table.add_row(
                    *(node.id, "running" if node.id in progress.running else "elsewhere", f"{part:.0%}"),
                    *_measured(directory, node.cost.tokens),
                )
        total = sum(node.cost.total for node in progress.nodes)
        table.caption = (
            f"{len(progress.finished)} of {len(progress.nodes)} runs done"
            + (f", {len(progress.failed)} failed" if progress.failed else "")
            + f" · {done_flops / total:.0%} of the work · {self._left(done_flops, total)}"
        )
        table.caption_justify = "left"
        self._live.update(table, refresh=True)

    def _left(self, done: float, total: float) -> str:
        """Time left, from the work done in this session."""
        if self._flops_at_start is None:
            self._flops_at_start = done
        gained, seconds = done - self._flops_at_start, time.monotonic() - self._start
        return f"about {period((total - done) / gained * seconds)} left" if gained > 0 else "measuring speed"

    def _print_news(self, progress: StudyProgress) -> None:
        """Without a terminal: one line per run that ended."""
        for node in progress.nodes:
            if node.id in (progress.finished | progress.failed.keys()) - self._printed:
                self._printed.add(node.id)
                word = "failed" if node.id in progress.failed else "done"
                out.print(
                    f"[{len(self._printed)}/{len(progress.nodes)}] {node.id} {word}",
                    highlight=False,
                    markup=False,
                )


def print_forecast(found: dict[str, Any], files: Sequence[str]) -> None:
    """What `tutelage study plan` says."""
    table = Table("runs", box=None, pad_edge=False)
    for name in ("number", "tokens"):
        table.add_column(name, justify="right")
    for kind, row in found["runs"].items():
        table.add_row(kind, f"{row['runs']:,}", short(row["tokens"]))
    table.add_row("all", f"{found['total_runs']:,}", short(found["total_tokens"]))
    out.print(table)
    table = Table("\nwork", box=None, pad_edge=False)
    table.add_column("\nFLOPs", justify="right")
    table.add_column("\nshare", justify="right")
    total = sum(found["flops"].values())
    for purpose, flops in found["flops"].items():
        table.add_row(purpose, f"{flops:.3g}", f"{flops / total:.1%}")
    table.add_row("all", f"{total:.3g}", "")
    out.print(table)
    memory, hours, path = found["memory"], found["time"], found["critical_path"]
    lines = [
        f"\nmemory   {memory['bytes'] / 1e9:.3g} GB on one device at most, by {memory['run']}"
        + ("" if memory["fits"] else ": more than the device has, so it must be divided over several"),
        f"         = {memory['formula']}",
        f"cache    {found['cache_bytes'] / 1e9:.3g} GB of kept teacher targets at most",
        f"time     {period(hours['wall_seconds'])} on {found['source']}, each run on one",
        f"         {hours['device_seconds'] / 3600:,.3g} device hours, start-up and loading not counted",
        f"energy   {found['energy_kwh']:,.3g} kWh at the devices' full power, cooling not counted",
        f"path     {period(path['seconds'])} at least, on any number of them: {' > '.join(path['runs'])}",
    ]
    if found["cost"] is not None:
        lines.append(f"cost     {found['cost']:,.2f} at {found['price']:g} per device hour")
    lines += [f"note     {note}" for note in found["notes"]]
    lines += [f"next     tutelage study run {file}" for file in files]
    out.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_status(status: Status, directory: Path) -> None:
    """What `tutelage study status` says."""
    _print_runs(status, directory)
    if status.seconds_left:
        out.print(f"left     {period(status.seconds_left)} of training, one run at a time", highlight=False)
    if status.error is not None:
        out.print(
            f"error    {status.error:.0%}: half of the {status.timed} finished runs took within that of "
            "their estimate (FLOPs over the speed of the others)",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"runs     {directory / 'runs'}", highlight=False, soft_wrap=True)
    todo = "`tutelage study run` with the same file goes on"
    if status.failed:
        todo = f"mend what failed, then `tutelage study retry {directory}` and `tutelage study run`"
    elif not status.counts.keys() - {"done"}:
        todo = f"`tutelage report {directory}`"
    elif status.active:
        todo = f"`tutelage study stop {directory}` stops it, checkpointed"
    out.print(f"next     {todo}", highlight=False, soft_wrap=True)


def _print_runs(status: Status, directory: Path) -> None:
    order = ("done", "running", "stopped", "failed", "waiting")
    counts = ", ".join(f"{status.counts[word]} {word}" for word in order if status.counts.get(word))
    out.print(f"{status.name}: {counts} of {sum(status.counts.values())} runs", highlight=False)
    if status.active:
        table = Table("run", "by", box=None, pad_edge=False)
        for name in ("done", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right")
        for one in status.active:
            part = one.state.get("step", 0) / max(1, one.state.get("steps", 1))
            table.add_row(
                one.run, one.where, f"{part:.0%}", *_measured(directory / "runs" / one.run, one.tokens)
            )
        out.print(table)
    for runner in status.runners:
        out.print(f"runner   {runner}", highlight=False, markup=False, soft_wrap=True)
    for run, reason in status.failed.items():
        out.print(f"failed   {run}: {reason}", highlight=False, markup=False, soft_wrap=True)
    for run in status.retried:
        out.print(f"again    {run}: an attempt failed", highlight=False, markup=False, soft_wrap=True)


def _measured(directory: Path, tokens: int) -> tuple[str, str, str]:
    """Loss, speed and time left of a run, by its newest row of metrics."""
    row = _last_row(directory / "metrics.jsonl")
    if not row:
        return "", "", ""
    speed = row["tokens_per_second"]
    left = (tokens - row["tokens"]) / max(speed, 1e-9)
    return f"{row['loss']:.3f}", f"{speed:,.0f}", period(left)


def _last_row(path: Path) -> dict[str, float]:
    """The newest whole row of metrics.jsonl; empty before there is one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    if len(lines) < 2:  # noqa: PLR2004 - a whole row and what follows its end
        return {}
    row: dict[str, float] = json.loads(lines[-2])
    return row


def _state(directory: Path) -> dict[str, float]:
    """What the run last wrote of itself; a file being replaced just now reads as before or after."""
    try:
        text = (directory / "state.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    state: dict[str, float] = json.loads(text)
    return state
