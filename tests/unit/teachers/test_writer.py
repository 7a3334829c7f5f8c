"""Writing a teacher cache: by several at once, killed at any moment, on a full disk, and still the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from manifests import change_manifest
from whole_caches import verify_cache

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.data.build import build_store
from tutelage.errors import DiskError, Stopped, UserError
from tutelage.models import hub, shapes
from tutelage.progress import NullProgress
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.job import load_job, plan_cache
from tutelage.teachers.cache.layout import read_cache_manifest
from tutelage.teachers.cache.reader import open_cache

SEAL = 32
"""Bytes at the end of a shard that tell whose it is."""

# Starts writers as real processes, quickly: it has imported everything and forks.
STARTER = """
import os, sys, traceback
import torch
torch.set_num_threads(1)
from tutelage.config.teacher_config import TeachConfig
from tutelage.teachers.cache.cache_writer import write_cache
print("ready", flush=True)
for line in sys.stdin:
    order, argument = line.split(" ", 1)
    if order == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        try:
            write_cache(TeachConfig.model_validate_json(argument))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
"""


class Starter:
    """Processes that write caches."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, config):
        return int(self._ask(f"start {config.model_dump_json()}"))

    def wait(self, pid):
        return int(self._ask(f"wait {pid}"))

    def _ask(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def starter():
    started = Starter()
    yield started
    started.process.stdin.close()
    started.process.wait()
    started.process.stdout.close()


@pytest.fixture
def models(text, tmp_path):
    """Two models with the text's tokenizer."""
    for seed in (3, 4):
        hub.save(
            hub.build(shapes.find_shape("nano-50k"), 300, 64, seed=seed), tmp_path / f"model-{seed}", text
        )
    return [tmp_path / "model-3", tmp_path / "model-4"]


def elsewhere(config, place):
    return config.model_copy(update={"output": place})


class Recorded(NullProgress):
    """What a writer said, and something done after some advance."""

    def __init__(self, after=0, action=lambda: None):
        self.calls, self.notes = [], []
        self.after, self.action = after, action

    def start(self, stage, total=None, unit="", done=0):
        self.calls.append((done, 0))
        self.tokens = total

    def advance(self, stage, done):
        self.done = done

    def describe(self, stage, figures):
        self.calls.append((self.done, figures["bytes"]))
        if len(self.calls) == self.after:
            self.action()

    def note(self, text):
        self.notes.append(text)


def interrupt():
    signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------------------------ killed, and together


def test_killed_twenty_times_and_finished_is_as_if_undisturbed(starter, teaching, tree, tmp_path):
    config = teaching(format={"kind": "hidden"}, shard_tokens=64)  # about 120 shards, and a head
    begin = time.monotonic()
    assert starter.wait(starter.start(config)) == 0
    whole = time.monotonic() - begin
    expected = tree(plan_cache(config).path)
    chance = random.Random(0)  # noqa: S311 - moments, not secrets
    kills, stages = 0, set()
    for attempt in range(100):
        if kills >= 20 and attempt:
            break
        again = elsewhere(config, tmp_path / f"again-{attempt}")
        path = plan_cache(again).path
        while True:
            pid = starter.start(again)
            time.sleep(chance.uniform(0, whole / 6))
            os.kill(pid, signal.SIGKILL)
            ended = starter.wait(pid)
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            kills += 1
            stages.add(len(list(path.glob("shards/*.bin"))))
        assert tree(path) == expected
        verify_cache(path)
    assert kills >= 20
    assert len(stages) >= 8  # they met it at different stages


def test_two_processes_together_write_what_one_writes(starter, teaching, tree, tmp_path):
    config = teaching(shard_tokens=64, format={"kind": "hidden"})
    assert starter.wait(starter.start(config)) == 0
    expected = tree(plan_cache(config).path)
    together = elsewhere(config, tmp_path / "together")
    for _ in range(2):
        first, second = starter.start(together), starter.start(together)
        assert (starter.wait(first), starter.wait(second)) == (0, 0)
        path = plan_cache(together).path
        assert tree(path) == expected
        shutil.rmtree(path)


def test_one_of_two_is_killed_and_the_other_finishes(starter, teaching, tree, tmp_path):
    config = teaching(shard_tokens=64)
    assert starter.wait(starter.start(config)) == 0
    expected = tree(plan_cache(config).path)
    together = elsewhere(config, tmp_path / "together")
    path = plan_cache(together).path
    first, second = starter.start(together), starter.start(together)
    while len(list(path.glob("shards/*.bin"))) < 20:
        time.sleep(0.001)
    os.kill(first, signal.SIGKILL)
    assert starter.wait(first) == -signal.SIGKILL
    assert starter.wait(second) == 0
    assert tree(path) == expected


def test_a_writer_waits_for_anothers_shard_and_takes_it_over_when_that_one_dies(starter, teaching, tree):
    config = teaching()
    path = plan_cache(config).path
    (path / "shards").mkdir(parents=True)
    hold = "from pathlib import Path; from tutelage.files import lock; import time\n"
    hold += "with lock(Path('000004.lock'), 'it'):\n    print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=path / "shards", stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        writer = starter.start(config)
        shards = load_job(plan_cache(config)).manifest.layout.shards
        while len(list(path.glob("shards/*.bin"))) < shards - 1:
            time.sleep(0.01)
        time.sleep(0.2)
        assert not (path / "shards" / "000004.bin").exists()
        with pytest.raises(UserError, match=f"{shards - 1} of {shards} shards done"):
            open_cache(path)
        other.kill()
    assert starter.wait(writer) == 0
    taken_over = tree(path)
    shutil.rmtree(path)
    write_cache(config)
    assert taken_over == tree(path)


def test_ctrl_c_while_waiting_for_another_process(teaching, tmp_path):
    """The signal comes while nothing is left to do but to wait."""
    config = teaching(shard_tokens=4096)
    path = plan_cache(config).path
    (path / "shards").mkdir(parents=True)
    hold = "from pathlib import Path; from tutelage.files import lock; import time\n"
    hold += "with lock(Path('000000.lock'), 'it'):\n    print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=path / "shards", stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(Stopped):
            write_cache(config)
        timer.join()
        other.kill()


def test_ctrl_c_stops_after_a_batch_and_the_same_call_goes_on(teaching, tree, tmp_path):
    config = teaching()
    expected = tree(write_cache(config))
    again = elsewhere(config, tmp_path / "again")
    path = plan_cache(again).path
    done = []
    for after in (2, 7, 9):
        watcher = Recorded(after, interrupt)
        with pytest.raises(Stopped):
            write_cache(again, watcher)
        names = [file.name for file in (path / "shards").iterdir() if not file.name.endswith(".lock")]
        assert all(not name.startswith(".") for name in names)
        done.append(len(names))
    assert done == sorted(done)
    assert 0 < done[-1] < len(expected)
    watcher = Recorded()
    write_cache(again, watcher)
    assert watcher.calls[0][0] > 0
    assert tree(path) == expected


def test_what_killed_writers_left_is_removed(teaching, tree):
    config = teaching(format={"kind": "hidden"})
    path = write_cache(config)
    expected = tree(path)
    (path / "shards" / "000001.bin").unlink()
    for name in ("shards/.000001.bin.77", ".manifest.json.77", ".head.safetensors.77", "shards/000001.lock"):
        (path / name).write_text("half")
    write_cache(config)
    assert tree(path) == expected


# -------------------------------------------------------------------------------------------- what it says


def test_progress_counts_positions_and_bytes(teaching):
    watcher = Recorded()
    path = write_cache(teaching(), watcher)
    cache = open_cache(path)
    assert watcher.tokens == cache.manifest.layout.positions
    assert watcher.calls[0] == (0, 0)
    assert watcher.calls == sorted(watcher.calls)
    assert watcher.calls[-1] == (watcher.tokens, cache.bytes)


def test_progress_counts_what_others_have_written(teaching, tmp_path):
    config = teaching()
    whole, path = write_cache(elsewhere(config, tmp_path / "other")), plan_cache(config).path
    watcher = Recorded(2, lambda: shutil.copytree(whole / "shards", path / "shards", dirs_exist_ok=True))
    cache = open_cache(write_cache(config, watcher))
    assert watcher.calls == sorted(watcher.calls)
    assert watcher.calls[-1] == (cache.manifest.layout.positions, cache.bytes)


def test_a_finished_cache_is_left_alone(teaching):
    path = write_cache(teaching())
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    watcher = Recorded()
    assert write_cache(teaching(), watcher) == path
    assert watcher.notes == [f"{path} is finished; nothing to do"]
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_batches_cover_every_position_once_and_stay_in_their_shard(teaching, text):
    job = load_job(plan_cache(teaching(batch_tokens=100)))
    layout = job.manifest.layout
    covered = []
    for shard in range(layout.shards):
        positions = layout.positions_of(shard)
        for batch in job.batches(shard):
            assert batch.tokens_BT.numel() <= 100
            length = batch.tokens_BT.shape[1]
            covered += [start + place for start in batch.starts for place in range(length)]
            assert positions.start <= batch.starts[0]
            assert covered[-1] < positions.stop
            assert torch.equal(batch.labels_BT[:, :-1], batch.tokens_BT[:, 1:])
    assert covered == list(range(layout.positions))


def test_the_directory_is_named_by_content(teaching, models, tmp_path):
    teacher = {"kind": "model", "path": str(models[0])}
    base = plan_cache(teaching(teacher=teacher)).path.name
    moved = shutil.copytree(models[0], tmp_path / "moved")
    same = [
        {"teacher": {"kind": "model", "path": str(moved)}},
        {"threads": 2},
        {"output": str(tmp_path / "other")},
    ]
    other = [
        {"teacher": {"kind": "model", "path": str(models[1])}},
        {"teacher": {"kind": "unigram"}},
        {"teacher": {"kind": "uniform"}},
        {"seed": 1},
        {"temperature": 2.0},
        {"context_length": 16},
        {"format": {"kind": "topk", "k": 3}},
        {"dtype": "bfloat16"},
        {"compress": True},
        {"shard_tokens": 1024},
        {"batch_tokens": 64},
    ]
    assert {plan_cache(teaching(**{"teacher": teacher} | change)).path.name for change in same} == {base}
    names = {plan_cache(teaching(**{"teacher": teacher} | change)).path.name for change in other}
    assert len(names - {base}) == len(other)
    assert plan_cache(teaching(teacher=teacher, name="mine")).path.name == f"mine-{base.split('-')[1]}"


def test_settings_of_a_format_without_a_kind_are_those_of_the_default(teaching):
    named = teaching(format={"kind": "sample_min_variance", "ids": 9})
    assert teaching(format={"ids": 9}) == named


def test_a_teacher_that_moves_half_way_changes_no_byte(teaching, models, tree, tmp_path):
    config = teaching(teacher={"kind": "model", "path": str(models[0])})
    with pytest.raises(Stopped):
        write_cache(config, Recorded(20, interrupt))
    manifest = (plan_cache(config).path / "manifest.json").read_bytes()
    moved = teaching(teacher={"kind": "model", "path": str(models[0].rename(tmp_path / "moved"))})
    path = write_cache(moved)
    assert read_cache_manifest(path).teacher.id == str(models[0])
    assert path / "manifest.json" != manifest
    verify_cache(path)


def test_a_mean_may_be_of_a_cache_whose_contexts_are_longer(teaching):
    """Also where the text ends, in the middle of a context."""
    hidden = {"kind": "hidden", "dtype": "float32"}
    longer = write_cache(teaching(teacher={"kind": "uniform"}, format=hidden, context_length=64))
    positions = read_cache_manifest(longer).layout.positions
    length = next(length for length in (32, 16, 64) if 64 % (positions % length or 64))
    found = []
    for part in ({"kind": "uniform"}, {"kind": "cache", "path": str(longer)}):
        mean = {"kind": "mean", "of": [{"kind": "unigram"}, part]}
        config = teaching(teacher=mean, format={"kind": "topk", "k": 20}, context_length=length)
        found.append(sorted(write_cache(config).glob("shards/*.bin")))
    live, cached = ([file.read_bytes()[:-SEAL] for file in files] for files in found)
    assert live == cached


def test_bfloat16_is_computed_and_kept(teaching, models):
    hidden = []
    for dtype in ("float32", "bfloat16"):
        path = write_cache(
            teaching(
                teacher={"kind": "model", "path": str(models[0])},
                format={"kind": "hidden", "dtype": "float32"},
                dtype=dtype,
            )
        )
        hidden.append(open_cache(path).read([0], 32).hidden_NE)
    assert not torch.equal(*hidden)
    torch.testing.assert_close(*hidden, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------- what fails


def test_mistakes_are_one_line_and_come_before_any_compute(teaching, text, tmp_path):
    config = StoreConfig(
        name="strange",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(vocab_size=300),
        max_bytes=40_000,
    )
    strange, small = tmp_path / "strange", tmp_path / "small"
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 64, 1), strange, build_store(config, tmp_path))
    hub.save(hub.build(shapes.find_shape("nano-50k"), 200, 64, 1), small, text)
    for changes, message in (
        ({"teacher": {"kind": "model", "path": str(strange)}}, "its tokenizer differs"),
        ({"teacher": {"kind": "model", "path": str(small)}}, "has 300 ids, the model knows 200"),
        ({"teacher": {"kind": "model", "path": str(tmp_path / "none")}}, "no such directory"),
        ({"teacher": {"kind": "run", "run": "missing-1"}}, "no run is called so in runs/"),
        ({"format": {"kind": "topk", "k": 301}}, "format.k"),
        ({"store": str(tmp_path)}, "not a token store"),
        ({"device": "mps"}, "no such device"),
        ({"output": "/proc/caches"}, "cannot be written"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_cache(teaching(**changes))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "caches").exists()


def test_a_cache_of_other_content_under_the_same_name_is_not_touched(teaching, tree):
    config = teaching()
    with pytest.raises(Stopped):
        write_cache(config, Recorded(20, interrupt))
    path = plan_cache(config).path
    change_manifest(path, seed=1)
    before = tree(path)
    with pytest.raises(UserError, match="other content"):
        write_cache(config)
    assert tree(path) == before


def test_a_finished_cache_of_other_content_in_its_place_is_not_taken_for_it(teaching, tree):
    config = teaching()
    other = write_cache(teaching(teacher={"kind": "uniform"}))
    path = write_cache(config)
    assert read_cache_manifest(path).fingerprint == plan_cache(config).fingerprint
    shutil.rmtree(path)
    shutil.copytree(other, path)
    with pytest.raises(UserError, match="holds a teacher cache of other content"):
        write_cache(config)
    assert tree(path) == tree(other)


def test_a_shard_of_another_cache_is_written_again(teaching, tree):
    config = teaching()
    path, other = write_cache(config), write_cache(teaching(seed=1))
    expected = tree(path)
    shutil.copy(other / "shards" / "000003.bin", path / "shards" / "000003.bin")
    write_cache(config)
    assert tree(path) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_what_will_not_fit_is_refused_at_the_start(teaching, small_disk):
    with pytest.raises(DiskError, match=r"needs about [1-9]\d?\.\d+ MB more, free are \d{3} KB") as caught:
        write_cache(teaching(format={"kind": "topk", "k": 100}, output=str(small_disk)))
    assert "\n" not in str(caught.value)
    assert not list(small_disk.rglob("shards"))


def test_a_disk_that_fills_up_keeps_finished_shards_and_the_same_call_goes_on(
    teaching, small_disk, tree, tmp_path
):
    config = teaching(format={"kind": "topk", "k": 2})
    expected = tree(write_cache(config))
    here = elsewhere(config, small_disk)
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    with pytest.raises(UserError, match="no space left on the device; free some") as caught:
        write_cache(here, Recorded(30, fill))
    assert "\n" not in str(caught.value)
    path = plan_cache(here).path
    finished = sorted(path.glob("shards/*.bin"))
    assert len(finished) >= 2
    assert not list(path.rglob(".*"))  # nothing half written
    assert all(expected[f"shards/{file.name}"] == file.read_bytes() for file in finished)
    ballast.unlink()
    write_cache(here)
    assert tree(path) == expected
    assert read_cache_manifest(path).fingerprint == read_cache_manifest(plan_cache(config).path).fingerprint
