"""Terminals that close, cannot say a character, or read no further; what they do never harms the work."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.text import Text
from tiny_study import TINY

from tutelage.cli.bars import out, say
from tutelage.config.load import validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.run import run as train
from tutelage.teachers.cache.cache_writer import write_cache

RUN = {
    "name": "tiny",
    "model": {"shape": "nano-20k"},
    "global_batch_tokens": 256,
    "checkpoint": {"every": 2560},
    "runtime": {"device": "cpu", "threads": 1, "log_every": 5},
}
CLOSED = signal.SIGHUP if sys.platform != "win32" else signal.SIGTERM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and processes of Linux")


def start(*arguments, **options):
    """The command as the leader of a terminal's session; what a terminal sends goes to all of its group."""
    return subprocess.Popen(
        [sys.executable, "-m", "tutelage", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def wait_for(pattern, place, process):
    """Wait until a file with something in it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in place.glob(pattern):
            with contextlib.suppress(OSError):
                if path.stat().st_size:
                    return path
        time.sleep(0.01)
    raise AssertionError(f"{pattern}: {process.communicate(timeout=10)}")


@pytest.fixture
def run_file(tmp_path, store):
    def write(**changes):
        path = tmp_path / "run.yaml"
        data = {"store": str(store), "sequence_length": 32}
        path.write_text(yaml.safe_dump(RUN | {"data": data, "output": str(tmp_path / "runs")} | changes))
        return path

    return write


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "study.yaml"
    group = TINY["students"]["main"] | {"tokens": "60K"}
    teachers = {"weak": {"shape": "nano-20k", "tokens": "60K"}}
    path.write_text(yaml.safe_dump(TINY | {"teachers": teachers, "students": {"main": group}}))
    return path


def status(directory):
    return json.loads((directory / "state.json").read_text())["status"]


@pytest.mark.slow
def test_work_goes_on_where_nobody_reads_and_no_character_can_be_said(run_file, tmp_path):
    place = tmp_path / "[x]" / "[/bold]:smile: ±"
    process = start(
        "train", run_file(tokens="4K", output=str(place)), env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 0
    (directory,) = place.iterdir()
    assert status(directory) == "done"


def test_work_goes_on_where_a_log_file_has_no_space_left(run_file, tmp_path):
    file, buffered = run_file(tokens="4K"), {"PYTHONUNBUFFERED": "", "TUTELAGE_LOG_SECONDS": "0.01"}
    script = (
        f"{sys.executable} -m tutelage train {file} >/dev/full 2>/dev/full && "
        f"{sys.executable} -m tutelage train {file} >/dev/full; echo $?; "
        f"{sys.executable} -m tutelage train missing.yaml 2>/dev/full; echo $?; "
        f"{sys.executable} -m tutelage show tiny --path >/dev/full; echo $?"
    )
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | buffered, cwd=tmp_path, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    (directory,) = (tmp_path / "runs").iterdir()
    assert status(directory) == "done"
    assert done.stdout.split() == ["0", "2", "2"], done.stderr  # the last had nothing to do but to print
    assert done.stderr.splitlines() == [
        f"{directory} is finished; nothing to do",
        "error: standard output: no space left on the device; free some and run the same command",
    ]


def test_what_is_printed_stands_as_it_is():
    with out.capture() as shown:
        say("run", "[x]/[/bold]:smile:/[red]y")
        out.print("[link=/]:warning:")
    assert shown.get() == "run      [x]/[/bold]:smile:/[red]y\n[link=/]:warning:\n"


def test_short_commands_end_quietly(tmp_path, store):
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    script = (
        f"{sys.executable} -m tutelage data show {store} | head -n 1 && "
        f"{sys.executable} -m tutelage schema run | head -n 1 && "
        f"{sys.executable} -m tutelage data list >&- && {sys.executable} -m tutelage '[/x]'"
    )
    done = subprocess.run(["bash", "-c", script], env=plain, capture_output=True, check=False, timeout=120)
    assert done.returncode == 2
    assert b"No such command '[/x]'" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr
    done.stdout.decode("ascii")


@pytest.mark.parametrize("arguments", ["schema run", "--help", "--version"])
@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_leaves_changes_no_exit_code(arguments, buffering):
    script = f"set -o pipefail; {sys.executable} -m tutelage {arguments} | true"
    plain = os.environ | {"PYTHONUNBUFFERED": buffering}
    done = subprocess.run(["bash", "-c", script], env=plain, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_wrong_copy_is_told_by_the_exit_code_whoever_reads(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy")
    (copy / "train.bin").write_bytes(b"")
    script = f"set -o pipefail; {sys.executable} -m tutelage verify {copy} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False, timeout=120)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_terminal_obeys_no_name_of_a_file():
    name = "a\x1b[31m\x07\u202eb"
    with out.capture() as shown:
        say("intact", name)
        out.print(Text(name, style="bold"))
    assert shown.get() == "intact   a\\x1b[31m\\u202eb\na\\x1b[31m\\u202eb\n"


@pytest.mark.parametrize("place", [b"dir", b"di\xff"])
def test_names_that_are_not_utf8_are_refused_before_any_work(run_file, tmp_path, place):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + place)
    os.mkdir(folder)  # noqa: PTH102 - pathlib has no use for such names either
    command = [sys.executable, "-m", "tutelage", "train", run_file(tokens="4K"), b"name=\xfe"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not UTF-8" in done.stderr
    assert os.listdir(folder) == []  # noqa: PTH208


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_closed_terminal_stops_a_run_which_goes_on_bitwise(run_file, tmp_path, processes, tutelage):
    file = run_file(tokens="200K")
    process = start("train", "--nproc", processes, file)
    metrics = wait_for("runs/*/metrics.jsonl", tmp_path, process)
    os.killpg(process.pid, CLOSED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(re.findall(rb"stopped after step \d+ of \d+; run the same command again to resume", err)) == 1
    assert status(metrics.parent) == "stopped"
    assert list(metrics.parent.glob("checkpoints/step-*"))
    assert all(json.loads(line)["step"] % 5 == 0 for line in metrics.read_text().splitlines())


@pytest.mark.slow
def test_a_stop_before_the_first_step_leaves_no_trace(run_file, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT, CLOSED):
        process = start("train", run_file(tokens="200K"))
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/lock")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == 130
        left = list(tmp_path.glob("runs/*/*"))
        assert not left or status(left[0].parent) == "stopped", left  # it was faster than the signal
        assert not list(tmp_path.glob("runs/*/lock"))


@pytest.mark.slow
def test_nohup_is_respected(run_file, tmp_path):
    command = ["nohup", sys.executable, "-m", "tutelage", "train", str(run_file(tokens="20K"))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    metrics = wait_for("runs/*/metrics.jsonl", tmp_path, process)
    os.killpg(process.pid, CLOSED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert status(metrics.parent) == "done"


def offspring(parent, word):
    """Processes below `parent` of which `word` is in the command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            above = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if above == parent and word in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_study_survives_its_fork_server_and_its_terminal(study_file, tmp_path):
    command = ["study", "run", study_file, "--output", tmp_path / "study", "--workers", "1"]
    process = start(*command)
    wait_for("study/runs/*/metrics.jsonl", tmp_path, process)
    (server,) = offspring(process.pid, "forkserver")
    os.kill(server, signal.SIGKILL)
    first = wait_for("study/runs/*/model/config.json", tmp_path, process)  # its worker has gone on
    os.killpg(process.pid, CLOSED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"Aborted" not in err
    assert b"Traceback" not in err
    assert not list((tmp_path / "study" / "queue").glob("failures/*"))
    assert not list((tmp_path / "study").glob("runs/*/lock"))
    assert {status(path) for path in (tmp_path / "study" / "runs").iterdir()} <= {"done", "stopped"}
    process = start(*command)
    lock = wait_for("study/runs/*/lock", tmp_path, process)
    os.kill(int(lock.read_text().split()[0]), signal.SIGKILL)  # the worker, which is replaced
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert status(first.parent.parent) == "done"
    assert {status(path) for path in (tmp_path / "study" / "runs").iterdir()} == {"done"}
    killed = [path.stem for path in (tmp_path / "study" / "queue").glob("failures/*")]
    assert killed in ([], [lock.parent.name])


@pytest.mark.slow
def test_a_closed_terminal_stops_teach_and_scoring_which_go_on(store, other_store, tmp_path, command):
    base = {"data": {"store": str(store), "sequence_length": 32}, "seed": 1, "tokens": "4K"}
    run = train(validate(RunConfig, RUN | base | {"output": str(tmp_path / "runs")}, "run"))
    teach = TeachConfig(
        store=store,
        teacher={"kind": "run", "run": run.id},
        runs=tmp_path / "runs",
        format={"kind": "topk", "k": 8},
        context_length=32,
        batch_tokens=64,
        shard_tokens=256,
        device="cpu",
        output=tmp_path / "caches",
    )
    (tmp_path / "teach.yaml").write_text(yaml.safe_dump(teach.model_dump(mode="json")))
    process = start("teach", tmp_path / "teach.yaml")
    shard = wait_for("caches/*/shards/*.bin", tmp_path, process)
    os.killpg(process.pid, CLOSED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    done = {path.name: path.stat().st_ino for path in shard.parent.glob("*.bin")}
    cache = write_cache(teach)
    whole = {path.name: path.read_bytes() for path in (cache / "shards").glob("*.bin")}
    assert len(done) < len(whole)
    kept = {path.name: path.stat().st_ino for path in (cache / "shards").glob("*.bin")}
    assert done.items() <= kept.items()
    fresh = write_cache(teach.model_copy(update={"output": tmp_path / "fresh"}))
    assert whole == {path.name: path.read_bytes() for path in (fresh / "shards").glob("*.bin")}

    shutil.copytree(run.path, tmp_path / "apart" / run.id)
    score = ("--store", f"few={other_store}", "--store", f"many={store}", "--max-tokens", "128")
    process = start("eval", "score", run.path, *score)
    wait_for("runs/*/scores.jsonl", tmp_path, process)
    os.killpg(process.pid, CLOSED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    before = run.scores.read_text()
    assert {json.loads(line)["domain"] for line in before.splitlines()} == {"few"}
    for place in (run.path, tmp_path / "apart" / run.id):
        assert command("eval", "score", place, *score)[0] == 0
    assert run.scores.read_text().startswith(before)
    files = (run.scores, tmp_path / "apart" / run.id / "scores.jsonl")
    went_on, at_once = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [one | {"code": ""} for one in went_on] == [one | {"code": ""} for one in at_once]
