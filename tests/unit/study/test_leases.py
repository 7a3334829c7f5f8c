from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from tiny_study import tiny_study

from tutelage.errors import UserError
from tutelage.progress import NullProgress
from tutelage.records import read_sealed, write_sealed
from tutelage.study.engines.local import LocalEngine
from tutelage.study.expand import expand
from tutelage.study.leases import Failures, Leases, ask_to_stop, is_gone, read_runner, runners
from tutelage.study.run_study import run_study
from tutelage.study.status import read_status

BEAT = 0.05
LESSEE = """
import sys
from pathlib import Path
from tutelage.study.leases import Leases
with Leases(Path(sys.argv[1]), 0.05) as leases:
    leases.refresh()
    free = [run for run in map(str, range(200)) if leases.state(run, "recipe") == "free"]
    won = [run for run in free if leases.acquire(run, "recipe")]
    print(",".join(won), flush=True)
    sys.stdin.read()
"""


def elsewhere(directory, token, **changes):
    """Make a runner look like one on another machine, whose processes cannot be seen from here."""
    path = directory / "queue" / "runners" / f"{token}.json"
    write_sealed(path, read_sealed(path) | {"machine": "another"} | changes)
    return path


def looks(leases, times):
    for _ in range(times):
        time.sleep(BEAT * 1.1)
        leases.refresh()
        leases.state("run", "recipe")
    return leases.state("run", "recipe")


def test_each_run_has_one_runner_and_a_killed_ones_are_free_at_once(tmp_path):
    command = [sys.executable, "-c", LESSEE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(4)]
    won = {process: process.stdout.readline().strip().split(",") for process in started}
    assert sorted(run for part in won.values() for run in part if run) == sorted(map(str, range(200)))
    killed = max(started, key=lambda process: len(won[process]))
    with Leases(tmp_path, 5.0) as leases:
        leases.refresh()
        assert {leases.state(run, "recipe") for run in map(str, range(200))} == {"theirs"}
        killed.kill()
        killed.communicate()
        leases.refresh()
        states = {run: leases.state(run, "recipe") for run in map(str, range(200))}
        assert {run for run, state in states.items() if state == "free"} == set(won[killed])
        assert leases.acquire(won[killed][0], "recipe")
    for process in started:
        process.communicate()


def test_a_lease_holds_until_it_is_released(tmp_path):
    with Leases(tmp_path, BEAT) as ours, Leases(tmp_path, BEAT) as theirs:
        assert ours.acquire("run", "recipe")
        theirs.refresh()
        assert theirs.state("run", "recipe") == "theirs"
        ours.refresh()
        assert ours.state("run", "recipe") == "ours"
        ours.release("run", done=False)
        theirs.refresh()
        assert theirs.state("run", "recipe") == "free"
        assert theirs.acquire("run", "recipe")
        assert not ours.acquire("run", "recipe")  # it has not looked since
        theirs.release("run", done=True)
        ours.refresh()
        assert ours.state("run", "recipe") == "done"
        assert ours.state("run", "more domains") == "free"


def test_a_silent_runner_elsewhere_is_taken_over_and_notices(tmp_path):
    with (
        Leases(tmp_path, 3600) as silent,
        Leases(tmp_path, BEAT, 3) as ours,
        Leases(tmp_path, BEAT, 3) as third,
    ):
        silent.acquire("run", "recipe")
        elsewhere(tmp_path, silent.token)
        assert looks(ours, 2) == "theirs"
        assert looks(ours, 3) == "free"
        looks(third, 5)
        assert [ours.acquire("run", "recipe"), third.acquire("run", "recipe")] == [True, False]
        silent.refresh()
        assert silent.state("run", "recipe") == "theirs"


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_clocks_of_other_machines_do_not_matter(tmp_path, skew):
    """A beating runner is alive, whatever time it says it is."""
    with Leases(tmp_path, 3600) as other, Leases(tmp_path, BEAT, 3) as ours:
        other.acquire("run", "recipe")
        for beat in range(8):
            elsewhere(tmp_path, other.token, beat=beat, time=time.time() + skew)
            assert looks(ours, 1) == "theirs"


def test_a_pause_of_the_reader_is_no_silence_of_others(tmp_path):
    with Leases(tmp_path, 3600) as other, Leases(tmp_path, BEAT, 3) as ours:
        other.acquire("run", "recipe")
        elsewhere(tmp_path, other.token)
        looks(ours, 1)
        time.sleep(BEAT * 10)
        assert looks(ours, 1) == "theirs"


def test_a_lease_caught_while_it_is_written_is_respected_and_one_left_so_is_not(tmp_path):
    with Leases(tmp_path, BEAT, 3) as leases:
        (tmp_path / "queue" / "leases" / "run.1.json").touch()
        leases.refresh()
        assert leases.state("run", "recipe") == "theirs"
        assert looks(leases, 5) == "free"
        assert leases.acquire("run", "recipe")
        assert (tmp_path / "queue" / "leases" / "run.2.json").exists()


def test_the_heart_beats_and_a_stop_is_for_one_runner(tmp_path):
    with Leases(tmp_path, BEAT) as one, Leases(tmp_path, BEAT) as two:
        path = tmp_path / "queue" / "runners" / f"{one.token}.json"
        first = read_runner(path).beat
        deadline = time.monotonic() + 10
        while read_runner(path).beat < first + 2 and time.monotonic() < deadline:
            time.sleep(BEAT)
        assert read_runner(path).beat >= first + 2
        assert not is_gone(read_runner(path))
        assert set(runners(tmp_path)) == {one.token, two.token}
        ask_to_stop(tmp_path, one.token)
        assert [one.is_asked_to_stop(), two.is_asked_to_stop()] == [True, False]
    assert runners(tmp_path) == {}
    assert list((tmp_path / "queue" / "runners").iterdir()) == []


def test_only_attempts_without_progress_count(tmp_path):
    failures = Failures(tmp_path, retries=1)
    for step in (0, 10, 20):
        failures.add("run", f"killed after {step}", step)
        assert failures.marked() == {}
    failures.add("run", "again", 20)
    assert failures.marked() == {"run": "again"}
    assert Failures(tmp_path, retries=2).marked() == {}
    assert failures.clear("run")
    assert failures.marked() == {}
    assert failures.attempted() == set()
    assert not failures.clear("run")


def test_attempts_within_the_same_second_are_told_apart_where_files_have_whole_seconds(tmp_path):
    failures, path = Failures(tmp_path, retries=1), tmp_path / "queue" / "failures" / "run.json"
    for marked in ({}, {"run": "hot"}):
        failures.add("run", "hot", 0)
        os.utime(path, (1, 1))
        assert failures.marked() == marked


@pytest.mark.parametrize(("retries", "kept"), [(0, []), (1, ["b"]), (2, ["a", "b"])])
def test_a_run_that_is_forgiven_has_one_attempt_left(tmp_path, retries, kept):
    failures = Failures(tmp_path, retries)
    failures.add("unlucky", "once", 0)
    for error in ["got further", "a", "b"] if retries < 2 else ["got further", "a", "a", "b"]:
        failures.add("run", error, 0 if error == "got further" else 10)
    assert "run" in failures.marked()
    failures.forgive()
    assert "run" not in failures.marked()
    path = tmp_path / "queue" / "failures" / "run.json"
    assert [one["error"] for one in (json.loads(path.read_text())["attempts"] if kept else [])] == kept
    assert ("run" in failures.attempted()) == bool(kept)  # and is tried alone
    assert ("unlucky" in failures.attempted()) == (retries > 0)
    failures.add("run", "again", 10)
    assert failures.marked()["run"] == "again"


def test_others_are_at_work_if_they_hold_a_run_and_live(tmp_path):
    with Leases(tmp_path, BEAT) as one, Leases(tmp_path, BEAT) as two:
        one.acquire("mine", "recipe")
        one.refresh()
        assert not one.others_at_work()  # it may wait, as one that has just started does
        two.acquire("theirs", "recipe")
        one.refresh()
        assert one.others_at_work()
        two.release("theirs", done=False)
        one.refresh()
        assert not one.others_at_work()
        two.acquire("theirs", "recipe")
    with Leases(tmp_path, BEAT) as three:  # both ended without releasing anything
        three.refresh()
        assert not three.others_at_work()
        far = {"host": "far", "machine": None, "pid": 1, "beat": 0}
        record = tmp_path / "queue" / "runners" / f"{two.token}.json"
        for age, at_work in ((0, True), (3600, False)):  # elsewhere only the heartbeat tells
            for skew in (-600, 0, 600):  # whatever its clock says
                write_sealed(record, far | {"time": time.time() + skew})
                os.utime(record, (time.time() - age,) * 2)
                assert three.others_at_work() == at_work


def test_the_queue_of_an_older_version_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "queue" / "claims").mkdir(parents=True)
    with pytest.raises(UserError, match=r"queue: by an older version.*delete that directory"):
        Leases(tmp_path)


class Moves(NullProgress):
    """Moves a study elsewhere as soon as one of its runs has trained."""

    def __init__(self, directory):
        self.directory = directory

    def advance(self, stage, done):
        if self.directory.exists() and [*self.directory.glob("runs/*/metrics.jsonl")]:
            self.directory.rename(self.directory.with_name("moved"))


def test_a_study_that_is_moved_while_it_trains_says_so_and_goes_on_there(tmp_path):
    place, changes = tmp_path / "study", {"teachers": {"weak": {"shape": "nano-20k", "tokens": "12K"}}}
    study = expand(tiny_study(**changes))
    with pytest.raises(UserError, match=r"study: has vanished while the study ran; .* --output") as caught:
        run_study(study, place, LocalEngine(1, []), Moves(place))
    assert "\n" not in str(caught.value)
    assert not (place / "plan.json").exists()
    (record,) = (tmp_path / "moved" / "queue" / "runners").iterdir()
    write_sealed(record, read_sealed(record) | {"pid": 2**22 + 1})  # as if this process had ended
    run_study(study, tmp_path / "moved", LocalEngine(1, []), NullProgress())
    assert read_status(tmp_path / "moved").counts == {"done": 3}


def test_no_lease_is_taken_in_a_directory_that_has_vanished(tmp_path):
    with Leases(tmp_path / "study", 5.0) as leases:
        (tmp_path / "study").rename(tmp_path / "moved")
        leases.refresh()
        with pytest.raises(UserError, match="has vanished"):
            leases.acquire("run", "recipe")
