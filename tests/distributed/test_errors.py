"""What goes wrong on one of several processes ends all of them, in one line that names the rank.

Also: tasks that `srun` started are such processes, without torchrun.
"""

from __future__ import annotations

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
from forked_ranks import free_port, said_by

from tutelage.launch import launch
from tutelage.train.checkpoint_files import checkpoint_name

pytestmark = pytest.mark.slow


@pytest.fixture
def on_three_ranks(make_config, store, tmp_path, monkeypatch, capfd):
    """What each of three ranks of `support/erring_ranks.py` saw, how they ended, and what was printed."""
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    (damaged / "manifest.json").write_text("{")
    config = make_config(global_batch_tokens=192, tokens=12 * 192).model_dump(mode="json")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "support")]))
    failed = launch(3, ["erring_ranks", json.dumps(config), str(tmp_path), str(damaged)])
    printed = capfd.readouterr()
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    return seen, failed, printed


def test_all_processes_end_with_the_error_of_one(on_three_ranks):
    seen, failed, printed = on_three_ranks
    everywhere = {
        "fine": ["", ""],
        "alike": ["UserError", "x.yaml: wrong"],
        "one": ["UserError", "rank 2: x.yaml: wrong"],
        "two": ["UserError", "rank 1: wrong on 1"],
        "stopped": ["Stopped", ""],
        "busy": ["LockedError", "rank 0: runs/x is locked"],
        "fine again": ["", ""],
        "trained": ["", ""],
    }
    for rank, mine in enumerate(seen):
        for name, expected in everywhere.items():
            assert mine[name] == expected, (rank, name)
        kind, line = mine["bug"]
        assert kind == ("KeyError" if rank == 1 else "UserError")
        assert rank == 1 or line == "rank 1: KeyError: 'lost'"
        assert mine["differing"][1].startswith("other is a on rank 0 and b on rank 2;")
        assert mine["another seed"][1].startswith("tiny: seed is 43 on rank 0 and 8 on rank 1;")
        assert "did not answer within 2 seconds" in mine["late"][1]
        assert mine["damaged"][1].startswith("rank 2: ")
        assert "damaged" in mine["damaged"][1]
        assert mine["mesh"][1] == "parallel: replicate = 2 times shard = auto does not make 3 processes"
        assert mine["batch"][1].startswith(
            "global_batch_tokens: 8 sequences per step do not divide by 3 ranks;"
        )
    assert next(iter(failed.values())) == 1
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: ZeroDivisionError: a bug"]
    assert printed.err.count("Traceback") == 1


@pytest.fixture
def training(make_config, tmp_path):
    """A run on two processes that `tutelage train --nproc 2` started, after its first steps."""
    config = make_config(tokens=256 * 100_000)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "tutelage", "train", "--nproc", "2", str(file), "checkpoint.every=1M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(config.output.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    yield process, next(config.output.iterdir())
    process.kill()
    process.wait()


def rank_of(pid):
    """RANK in the environment of a process."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(one[5:]) for one in variables if one.startswith(b"RANK=")), None)


def children(process):
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return {rank_of(pid): int(pid) for pid in text.split()}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_killed_rank_is_named(training):
    process, _ = training
    os.kill(children(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: its process ended by signal SIGKILL (out of memory?)"]
    assert "Traceback" not in err
    assert (process.returncode, out) == (1, "")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_killed_rank_alone_is_named_if_the_signal_to_stop_comes_before_its_loss_is_seen(training):
    process, _ = training
    ranks = children(process)
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)
    time.sleep(2)  # the launcher looks ten times a second, and ends rank 0
    os.kill(ranks[0], signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1: its process ended by signal SIGKILL (out of memory?)"]
    assert "Traceback" not in err
    assert (process.returncode, out) == (1, "")


@pytest.mark.parametrize("where", ["store", "group", "checkpoints"])
def test_a_process_that_waits_for_a_dead_one_hears_a_signal_to_stop(make_config, tmp_path, where):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    script = Path(__file__).parents[1] / "support" / "deserted_rank.py"
    done = subprocess.run([sys.executable, str(script), str(file), where],
                          capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, seconds = done.stdout.split()[-2:]
    assert int(code) == 130
    assert float(seconds) < 5
    assert done.stderr == "\nstopped; run the same command again to resume\n"


FROZEN = """
import os, signal
from tutelage.agreement import last_words, meeting_place, together
from tutelage.errors import UserError
meeting_place()
if os.environ["RANK"] == "0":
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    with together(1):
        pass
except UserError as error:
    print(error)
    print(last_words(error), flush=True)
"""


def test_a_process_whose_store_is_out_of_reach_ends_all_the_same():
    """What asks a machine that is frozen, or behind a cable that was pulled, has no end by itself."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", FROZEN],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    )
    with first, second:
        try:
            said, _ = second.communicate(timeout=120)
        finally:
            first.kill()
            second.kill()
    error = "rank 0 did not answer within 1 seconds (parallel.timeout), or has ended: "
    error += "the process that all write to is stopped or out of reach"
    assert said.splitlines() == [error, f"rank 1: {error}"]


def test_a_signal_is_passed_on_and_the_run_can_go_on(training):
    process, directory = training
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (step,) = re.findall(r"stopped after step (\d+) of 100,000; run the same command again to resume", err)
    state = json.loads((directory / "state.json").read_text())
    assert state["status"] == "stopped"
    assert (directory / "checkpoints" / checkpoint_name(int(step))).is_dir()


def test_tasks_of_srun_train_together_without_torchrun(make_config, tmp_path):
    config = make_config()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    port = str(free_port())
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
    ranks = [
        os.environ
        | slurm
        | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port, "WORLD_SIZE": ""}
        for rank in ("0", "1")
    ]
    printed = said_by([[sys.executable, "-m", "tutelage", "train", str(file)]] * 2, ranks)
    (directory,) = config.output.iterdir()
    assert json.loads((directory / "state.json").read_text())["status"] == "done"
    assert f"run      {directory}" in printed[0][0]
    assert f"{directory.name}: done" in printed[0][1]
    assert printed[1] == ("", "")
