"""Print what a study will take, and how it stands."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tutelage.cli.bars import out, print_table, say
from tutelage.cli.stages import period
from tutelage.files import short, size_text
from tutelage.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tutelage.analysis.claims.power import StudyPower
    from tutelage.study.status import Status


def print_forecast(found: dict[str, Any], files: Sequence[str], output: Path | None) -> None:
    """Print a forecast, and how to run the study `files`, a single one in the directory `output`."""
    table = Table("runs", box=None, pad_edge=False)
    for name in ("number", "tokens"):
        table.add_column(name, justify="right")
    for kind, row in found["runs"].items():
        table.add_row(kind, f"{row['runs']:,}", short(row["tokens"]))
    table.add_row("all", f"{found['total_runs']:,}", short(found["total_tokens"]))
    print_table(table)
    table = Table("\nwork", box=None, pad_edge=False)
    table.add_column("\nFLOPs", justify="right")
    table.add_column("\nshare", justify="right")
    total = sum(found["flops"].values())
    for purpose, flops in found["flops"].items():
        table.add_row(purpose, f"{flops:.3g}", f"{flops / total:.1%}")
    table.add_row("all", f"{total:.3g}", "")
    print_table(table)
    _print_sizes(found["sizes"])
    memory, hours, path = found["memory"], found["time"], found["critical_path"]
    out.print()
    too_much = "" if memory["fits"] else ": more than the device has on any number of them"
    say("memory", f"{size_text(memory['bytes'])} on one device at most, by {memory['run']}{too_much}")
    if memory["devices"] > 1:
        say(
            "",
            f"runs take up to {memory['devices']} devices each; run.parallel.processes must say so",
        )
    if found["cache_bytes"]:
        say(
            "cache",
            f"{size_text(found['cache_bytes'])} of kept teacher targets, at the most that a token takes",
        )
    say("time", f"{period(hours['wall_seconds'])} on {found['source']}")
    say("", f"{hours['device_seconds'] / 3600:,.3g} device hours, start-up and loading not counted")
    say("energy", f"{found['energy_kwh']:,.3g} kWh at the devices' full power, cooling not counted")
    say("path", f"{period(path['seconds'])} at least, on any number of them: {' > '.join(path['runs'])}")
    if found["cost"] is not None:
        say("cost", f"{found['cost']:,.2f} at {found['price']:g} per device hour")
    for note in found["notes"]:
        say("note", note)
    where = "" if output is None or len(files) > 1 else f" --output {shlex.quote(str(output))}"
    for file in files:
        say("next", f"tutelage study run {file}{where}")


def print_power(power: StudyPower) -> None:
    """Print what a study can decide of its claims."""
    from tutelage.analysis.report.claim_rows import power_sentences, power_table

    answer, *about = power_sentences(power)
    power_table(power).print_on(out, "")
    for sentence in (answer, *about):
        out.print(Text(sentence))
    out.print()


def _print_sizes(sizes: Sequence[dict[str, Any]]) -> None:
    """Print over how many devices runs are divided, and their memory and hours."""
    table = Table("\nsize", "\nteacher beside it", box=None, pad_edge=False)
    for name in ("runs", "devices each", "GB on each", "hours each"):
        table.add_column(f"\n{name}", justify="right")
    for row in sizes:
        table.add_row(
            row["shape"],
            row["teacher"] or "",
            f"{row['runs']:,}",
            f"{row['devices']}",
            f"{row['bytes'] / 1e9:.3g}",
            f"{row['hours']:,.3g}",
        )
    print_table(table)


def print_status(status: Status, directory: Path) -> None:
    """Print the status of the study in `directory`, and what can be done next."""
    _print_runs(status, directory)
    if status.seconds_left:
        say("left", f"{period(status.seconds_left)} of training, one run at a time")
    if status.error is not None:
        say(
            "time",
            f"estimates are off by {status.error:.0%}: half of the {status.timed} finished runs took within "
            "that of theirs (FLOPs over the speed of the others)",
        )
    say("runs", directory / "runs")
    typed = shlex.quote(str(directory))
    todo = "`tutelage study run` with the same file resumes"
    if status.failed and status.at_work:
        todo = f"mend what failed, then `tutelage study retry {typed}`: runners at work take it up"
    elif status.failed:
        todo = "mend what failed, then `tutelage study run` with the same file tries it again"
    elif not status.counts.keys() - {"done"}:
        todo = f"`tutelage report {typed}`"
    elif status.at_work:
        todo = f"`tutelage study stop {typed}` stops it, checkpointed"
    say("next", todo)


def _print_runs(status: Status, directory: Path) -> None:
    order = ("done", "running", "stopped", "failed", "waiting")
    counts = ", ".join(f"{status.counts[word]} {word}" for word in order if status.counts.get(word))
    out.print(f"{status.name}: {counts} of {sum(status.counts.values())} runs")
    if status.active:
        table = Table("run", "by", box=None, pad_edge=False)
        for name in ("done", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right")
        for one in status.active:
            part = one.state.get("step", 0) / max(1, one.state.get("steps", 1))
            table.add_row(
                one.run,
                one.where,
                f"{part:.0%}",
                *_measured(RunDirectory(directory / "runs" / one.run), one.tokens),
            )
        print_table(table)
    for runner in status.runners:
        say("runner", runner)
    for run, reason in status.failed.items():
        say("failed", f"{run}: {reason}")
    for run in status.retried:
        say("again", f"{run}: an attempt failed")
    if others := status.not_planned:
        first, more = others[0], f" and {len(others) - 1} more" if len(others) > 1 else ""
        say(
            "others",
            f"{first}{more}: there, but not in this plan, which has been edited or is one of a part; what no "
            "version of the study needs any more may be deleted",
        )


def _measured(directory: RunDirectory, tokens: int) -> tuple[str, str, str]:
    """Return loss, speed and time left of a run, from its newest row of metrics."""
    row = directory.last_metrics()
    if not row:
        return "", "", ""
    speed = row["tokens_per_second"]
    left = (tokens - row["tokens"]) / max(speed, 1e-9)
    return f"{row['loss']:.3f}", f"{speed:,.0f}", period(left)
