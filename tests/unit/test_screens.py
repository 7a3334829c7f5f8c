"""What is seen of work that goes on: in a real terminal of 80 x 24, in a log file, in a study's table."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from tutelage.analysis.report.report_table import Column, ReportTable
from tutelage.analysis.report.text import print_scores, print_tasks
from tutelage.cli.bars import RichProgress, err
from tutelage.cli.stages import Stage, rows
from tutelage.errors import UserError
from tutelage.types import Score

DRAWS = Path(__file__).parents[1] / "support" / "drawn_stages.py"
NAME = "qwen3-0.6b-strong-alpha0.4-s43-8b4c1f02"
FIGURES = ("loss 3.214", "ce 3.501", "kd_top50 2.783", "alpha 0.40", "123,457 tokens/s")
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(columns: int, lines: int, *command: str | Path) -> str:
    """What a command writes to a terminal of that size."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    unsized = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    with subprocess.Popen(
        [sys.executable, *command], env=unsized | {"TERM": "xterm-256color"}, **streams
    ) as process:
        os.close(follower)
        written = b""
        try:
            while piece := os.read(leader, 65536):
                written += piece
        except OSError:  # the terminal has no other user any more
            pass
    os.close(leader)
    assert process.returncode == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("name", [NAME, "student-8b4c1f02"])
def test_a_terminal_of_80_columns_shows_all_that_matters(name):
    written = in_terminal(80, 24, DRAWS, name)
    lines = [CONTROLS.sub("", line).rstrip() for line in re.split(r"[\r\n]+", written)]
    drawn = lines[: next(i for i, line in enumerate(lines) if line.startswith(f"{name}: done"))]
    assert max(map(len, drawn)) <= 80
    head = next(line for line in reversed(drawn) if "1,240/95,367 steps" in line)
    assert head.startswith(name[:6])
    assert name[-13:] in head
    assert re.search(r"steps (under 1|\d) s · [\d.]+ (s|min|h) left$", head)
    assert all(figure in drawn[-1] for figure in FIGURES), drawn[-1]
    assert "resuming after step 1,000 of 95,367" in lines


def test_a_log_file_gets_a_line_soon_and_then_regularly(tmp_path):
    with (tmp_path / "log").open("w") as log:
        every = {"TUTELAGE_LOG_SECONDS": "0.3"}
        subprocess.run([sys.executable, DRAWS, NAME], stderr=log, env=os.environ | every, check=True)
    first, *lines, last = (tmp_path / "log").read_text().splitlines()
    assert first == "resuming after step 1,000 of 95,367"
    assert 2 <= len(lines) <= 4
    for line in lines:
        parts = line.removeprefix(f"{NAME}: ").split(" · ")
        assert re.fullmatch(r"1,2[0-4]\d/95,367 steps", parts[0])
        assert tuple(parts[1:6]) == FIGURES
        assert parts[-1].endswith(" left")
    assert last.startswith(f"{NAME}: done · 1,240/95,367 steps · loss 3.214")


@pytest.mark.parametrize("text", ["often", "-1", "nan", "inf"])
def test_seconds_between_lines_that_are_none_are_refused(monkeypatch, text):
    monkeypatch.setenv("TUTELAGE_LOG_SECONDS", text)
    with pytest.raises(UserError, match=f"TUTELAGE_LOG_SECONDS = '{text}': give seconds"):
        RichProgress()


def test_no_lines_are_printed_where_none_are_wanted(monkeypatch):
    monkeypatch.setenv("TUTELAGE_LOG_SECONDS", "0")
    with err.capture() as shown, RichProgress() as progress:
        progress.start("one", 2, "steps")
        progress._stages["one"].began -= 1000
        progress.describe("one", {"loss": 1.0})
    assert shown.get() == ""


@pytest.mark.parametrize("size", [(80, 24), (60, 10), (132, 43), (40, 5)])
@pytest.mark.parametrize("count", [1, 3, 9, 24, 60])
def test_rows_never_exceed_the_screen(size, count):
    width, height = size
    names = [f"main-from-strong-alpha0.{i}-s43" for i in range(count)]
    stages = [
        Stage(name, 1.0, done=i / count, figures={"loss": 3.2, "ce": 3.1}) for i, name in enumerate(names)
    ]
    drawn = rows([Stage(f"{count} runs", 9e15, done=1e15, figures={"done": 1}), *stages], width, height)
    assert len(drawn) <= height - 1
    shown = [row.plain for row in drawn]
    if width >= 60:
        assert max(map(len, shown)) <= width
        assert all(f"alpha0.{i}-s43" in "".join(shown) for i in range(min(count, height - 3)))
    if count + 1 > height - 1:
        assert shown[-1] == f"and {count + 1 - (height - 2)} more"


VERDICTS = ReportTable(
    "Does a teacher help?",
    tuple(map(Column, ("teacher", "measured", "alpha", "in domain", "out of domain", "fitted", "in words"))),
    [
        [
            "same-level",
            "same-level",
            "0.6",
            "+2.5% ± 0.4",
            "+1.8% ± 0.1",
            "+1.2% ± 0.4",
            "helps in and out of domain",
        ],
        [
            "unigram control",
            "",
            "0.1",
            "-1.6% ± 1.0",
            "+3.2% ± 0.6",
            "-0.6% ± 0.7",
            "helps out of domain, hurts in domain",
        ],
    ],
)


@pytest.mark.parametrize("width", [160, 80, 50])
def test_a_table_of_verdicts_keeps_its_numbers_whole(width):
    console = Console(width=width)
    with console.capture() as shown:
        VERDICTS.print_on(console, "Gain: percent")
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert max(map(len, lines)) <= width
    text = re.sub(r"\s+", " ", " ".join(lines))
    for row in VERDICTS.rows:
        assert all(cell in text for cell in row)
    if width >= 80:
        assert sum("± 0.4  +1.8% ± 0.1" in re.sub(" {2,}", "  ", line) for line in lines) == 1


def test_models_stand_side_by_side_as_far_as_there_is_room():
    names = [f"student-{number}b4c1f02" for number in range(5)]
    scores = [
        dict.fromkeys(("split", "version"), "test")
        | {"run": name, "domain": "kjv", "metric": "bits_per_byte", "fit_error": None}
        | {"value": 3 + number / 1000, "low": 2.9, "high": 3.1}
        for number, name in enumerate(names)
    ]
    for width in (60, 80, 160):
        console = Console(width=width)
        with console.capture() as shown:
            print_scores(scores, {}, console)
        lines = [line.rstrip() for line in shown.get().splitlines()]
        assert max(map(len, lines)) <= width
        assert sum(line.count("[2.900, 3.100]") for line in lines) == len(names)
        assert all(any(name in line for line in lines) for name in names)


def test_names_in_a_table_of_tasks_keep_their_ends_at_80_columns():
    ends = ("a2b41f07", "95c0d3e8")
    rest = ("probe", "test", "acceptance_rate", 0.9, 0.002, 64, True, "v1")
    scores = [
        Score(f"student-nano-50k-100M-strong-alpha-0.4-{end}", 10, 1000, f"acceptance:strong-{end}", *rest)
        for end in ends
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    print_tasks(scores, "probe", "documents", console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert all("".join(shown.split()).count(end) >= 1 for end in ends)
