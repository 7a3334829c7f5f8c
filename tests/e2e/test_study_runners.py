"""Several commands run one study at the same time, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny_study import TINY

from tutelage.files import lock
from tutelage.records import read_sealed, write_sealed

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path):
    """The file of a tiny study."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(study, *settings):
    settled = [*settings, "--output", str(study.parent / "output"), "--workers", "1"]
    return [sys.executable, "-m", "tutelage", "study", "run", str(study), *settled]


def start(study, *settings, **variables):
    return subprocess.Popen(
        command(study, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
        start_new_session=True,
    )


def records(study):
    """What the runners of a study have written about themselves."""
    return [json.loads(path.read_text()) for path in (study.parent / "output/queue/runners").glob("*.json")]


def states(study):
    """The state of every run that has begun, by its directory."""
    found = (study.parent / "output" / "runs").glob("*/state.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def until(true, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runners_that_start_a_study_anew_at_the_same_moment_share_it(study):
    """The one that prepared it took the other, which waited, for a runner of the plan that was there."""
    subprocess.run(command(study), check=True, capture_output=True)
    with lock(study.parent / "output" / "lock", "study"):
        runners = [start(study, "seeds=[43,44]") for _ in range(2)]
        until(lambda: len(records(study)) == 2)
    said = [runner.communicate(timeout=120)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], said
    assert json.loads((study.parent / "output/plan.json").read_text())["seeds"] == [43, 44]


def test_a_runner_of_another_plan_is_refused(study):
    first = start(study)
    until(lambda: states(study))  # while it prepares the study, others wait for it
    first.send_signal(signal.SIGSTOP)  # or it would have ended before the other looks
    refused = subprocess.run(
        command(study, "seeds=[44]"), capture_output=True, text=True, timeout=120, check=False
    )
    first.send_signal(signal.SIGCONT)
    assert refused.returncode == 2
    assert f"process {first.pid} on" in refused.stderr
    assert "runs another plan there; stop it with `tutelage study stop " in refused.stderr
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_a_runner_mends_what_it_has_written_over_where_locks_end_at_the_machine(study, tmp_path):
    """It was suspended until another, which no lock kept away, had taken over its run and finished it."""
    here = tmp_path / "here"
    here.mkdir()
    here.joinpath("sitecustomize.py").write_text(
        "import filelock\nfilelock.lock_descriptor = lambda *_, **__: True\n"
    )
    locks = {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    long = "students.main.tokens=20K"
    first = start(study, long, **locks)
    until(
        lambda: any(
            "student" in run and 2 < state.get("step", 0) < 40 for run, state in states(study).items()
        )
    )
    os.killpg(first.pid, signal.SIGSTOP)
    (begun,) = [run for run, state in states(study).items() if state["status"] == "running"]
    (record,) = (study.parent / "output/queue/runners").iterdir()
    write_sealed(record, read_sealed(record) | {"pid": 2**22 + 1})  # others see it as dead at once
    second = start(study, long, **locks)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    tables = {path: path.read_bytes() for path in (study.parent / "output/tables").iterdir()}
    done = states(study)[begun]
    first.send_signal(signal.SIGCONT)  # it sees that all is finished ...
    time.sleep(2.0)
    os.killpg(first.pid, signal.SIGCONT)  # ... and its worker goes on where it was
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert {state["status"] for state in states(study).values()} == {"done"}
    assert states(study)[begun]["step"] == done["step"]
    assert {path: path.read_bytes() for path in tables} == tables
