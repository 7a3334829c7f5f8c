"""Several commands run one study at the same time, each a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny_study import TINY

from tutelage.files import lock


@pytest.fixture
def study(tmp_path):
    """The file of a tiny study."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(study, *settings):
    settled = [*settings, "--output", str(study.parent / "output"), "--workers", "1"]
    return [sys.executable, "-m", "tutelage", "study", "run", str(study), *settled]


def start(study, *settings):
    return subprocess.Popen(
        command(study, *settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def records(study):
    """What the runners of a study have written about themselves."""
    return [json.loads(path.read_text()) for path in (study.parent / "output/queue/runners").glob("*.json")]


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
    until(lambda: [one for one in records(study) if one["plan"]])
    first.send_signal(signal.SIGSTOP)  # or it would have ended before the other looks
    refused = subprocess.run(command(study, "seeds=[44]"), capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    assert refused.returncode == 2
    assert f"process {first.pid} on" in refused.stderr
    assert "runs another plan there; stop it with `tutelage study stop " in refused.stderr
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
