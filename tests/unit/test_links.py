"""What somebody has planted where files are written is never written through, and never waited for."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from synthetic_study import write_study

from tutelage.checksums import file_sum
from tutelage.errors import UserError
from tutelage.evals.score_files import add_calibration, read_scores
from tutelage.files import (
    atomic_directory,
    lock,
    make_directory,
    no_links,
    own_directory,
    read_bytes,
    remove,
)
from tutelage.models.directory import weights_fingerprint
from tutelage.records import UnreadableError, read_model, read_object
from tutelage.run_directory import RunDirectory
from tutelage.study.leases import Failures, Leases, ask_to_stop
from tutelage.study.results import load_results
from tutelage.study.status import read_status
from tutelage.study.token_tables import read_token_comparisons
from tutelage.train.checkpoint_files import PARTIAL, CheckpointManifest, remove_unfinished
from tutelage.verify import verify

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of Unix")


@pytest.fixture
def victim(tmp_path):
    """A directory with a file outside of where is written; unchanged at the end."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    before = {path: path.lstat().st_mode for path in outside.rglob("*")}
    yield outside / "file"
    assert {path: path.lstat().st_mode for path in outside.rglob("*")} == before
    assert (outside / "file").read_text() == "precious"


PLANTS = {
    "symbolic link": lambda path, victim: path.symlink_to(victim),
    "dangling link": lambda path, victim: path.symlink_to(victim.parent / "new"),
    "link to a directory": lambda path, victim: path.symlink_to(victim.parent),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "pipe": lambda path, _: os.mkfifo(path),
    "link to a device": lambda path, _: path.symlink_to("/dev/zero"),
}
planted = pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())


def held(run):
    with run.lock():
        pass


@pytest.mark.timeout(20)
@planted
@pytest.mark.parametrize(
    ("name", "write"),
    [("lock", held), ("metrics.jsonl", lambda run: run.append_metrics({"step": 1}))],
    ids=["lock", "metrics"],
)
def test_open_files_refuse_it(name, write, plant, victim, tmp_path):
    run = RunDirectory(make_directory(tmp_path / "run"))
    plant(run.path / name, victim)
    with pytest.raises(UserError, match=rf"{name}.*cannot be written") as caught:
        write(run)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
@planted
def test_replaced_files_replace_it(plant, victim, tmp_path):
    run = RunDirectory(make_directory(tmp_path / "run"))
    names = ("state.json", "config.yaml", "provenance.json", "calibration.json")
    for name in names:
        plant(run.path / name, victim)
    if (run.path / "calibration.json").is_file():
        (run.path / "calibration.json").unlink()  # its content is kept, and must be ours
    run.write_config("name: x", {"time": "now"})
    run.write_state("running")
    add_calibration(run.path / "calibration.json", "domain", "1", {})
    for name in names:
        path = run.path / name
        assert path.is_file()
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1


@pytest.mark.timeout(20)
@planted
def test_replaced_directories_replace_it(plant, victim, tmp_path):
    for name in ("model", ".partial-model-1"):
        plant(tmp_path / name, victim)
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
    assert not (tmp_path / "model").is_symlink()
    assert not os.path.lexists(tmp_path / ".partial-model-1")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@planted
def test_an_unfinished_checkpoint_is_removed_as_what_it_is(plant, victim, tmp_path):
    plant(tmp_path / f"{PARTIAL}step-000000001", victim)
    remove_unfinished(tmp_path)
    assert not os.path.lexists(tmp_path / f"{PARTIAL}step-000000001")


@planted
def test_the_queue_refuses_or_replaces_it(plant, victim, tmp_path):
    study = make_directory(tmp_path / "study")
    runners = make_directory(study / "queue" / "runners")
    make_directory(study / "queue" / "failures")
    plant(runners / "a.stop", victim)
    plant(study / "queue" / "failures" / "r.json", victim)
    with Leases(study, beat_seconds=60) as leases:
        plant(study / "queue" / "leases" / "r.1.json", victim)
        assert not leases.acquire("r", "recipe")  # it exists, so somebody else has it
        ask_to_stop(study, "a")
    assert (runners / "a.stop").is_file()
    assert not (runners / "a.stop").is_symlink()


@pytest.mark.timeout(20)
def test_pipes_are_not_waited_for(tmp_path):
    run = RunDirectory(tmp_path)
    for name in ("state.json", "metrics.jsonl", "scores.jsonl", "config.yaml", "manifest.json", "a.json"):
        os.mkfifo(tmp_path / name)
    make_directory(tmp_path / "queue" / "failures")
    os.mkfifo(tmp_path / "queue" / "failures" / "r.json")
    assert run.state() == run.last_metrics() == {}
    assert run.recent_ce() is None
    assert not run.is_done()
    assert read_scores(run.scores) == []
    assert Failures(tmp_path, 1).marked() == {}
    with pytest.raises(UserError, match=r"config\.yaml: is no file"):
        run.config()
    with pytest.raises(UnreadableError, match="no file"):
        read_model(tmp_path / "a.json", dict)
    with pytest.raises(OSError, match="it is no file"):
        CheckpointManifest.read(tmp_path)
    os.mkfifo(tmp_path / "calibration.json")
    add_calibration(tmp_path / "calibration.json", "domain", "1", {})
    assert (tmp_path / "calibration.json").is_file()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", [read_bytes, read_object, file_sum], ids=lambda one: one.__name__)
def test_what_is_no_file_is_refused_in_a_sentence(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    Path("zero").symlink_to("/dev/zero")
    Path("folder").mkdir()
    for name in ("pipe", "socket", "zero", "folder"):
        with pytest.raises((OSError, UserError)) as caught:
            read(Path(name))
        assert name in str(caught.value)


NO_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to nowhere": lambda path: path.symlink_to("/nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("plant", NO_FILES.values(), ids=NO_FILES.keys())
def test_parts_of_studies_models_and_tasks_that_are_no_files_are_named_or_left_out(plant, tmp_path):
    study = write_study(tmp_path / "study", seeds=(43,))
    run = study / "runs" / "student-weak-0.2-43"
    for place in (study / "queue" / "failures" / "r.json", study / "queue" / "leases" / "r.1.json"):
        plant(make_directory(place.parent) / place.name)
    assert Failures(study, 1).marked() == {}
    assert read_status(study).counts["done"] == 8
    for name in ("documents.parquet", "scores.jsonl", "metrics.jsonl", "provenance.json"):
        plant(moved_away(run / name))
        (problem,) = load_results(study).problems
        assert problem.startswith(f"{run.name}: {name}: ")
        remove(run / name)
        (run / f"{name}~").rename(run / name)
    tokens = make_directory(study / "token-comparisons" / "a" / "b")
    (tokens / "comparison.json").write_text('{"student": "s", "teacher": "t", "baseline": "b"}')
    plant(tokens / "summary.parquet")
    assert "no finished token comparison" in read_token_comparisons(study)[1][0]
    plant(make_directory(run / "checkpoints" / "step-000000001") / "shard")
    assert any(one.what == "checkpoint" and one.wrong for one in verify(study, lambda _: None))

    model = make_directory(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "llama"}')
    plant(model / "model.safetensors")
    with pytest.raises(UserError, match=r"model.*: .*(cannot be read|no model\.safetensors)"):
        weights_fingerprint(model)


def moved_away(path):
    """The path, from which a file was moved to one with a tilde."""
    path.rename(f"{path}~")
    return path


def test_own_directories_are_no_links(victim, tmp_path):
    (tmp_path / "tables").symlink_to(victim.parent)
    with pytest.raises(UserError, match="tables: is a link"):
        own_directory(tmp_path / "tables")
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert make_directory(tmp_path / "runs" / "r").is_dir()  # where the user keeps runs
    remove(tmp_path / "runs")
    assert (tmp_path / "disk" / "r").is_dir()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="gives a link to another user")
def test_links_of_other_users_are_not_followed(victim, tmp_path):
    (tmp_path / "runs").symlink_to(victim.parent)
    os.chown(tmp_path / "runs", 12345, 12345, follow_symlinks=False)
    with pytest.raises(UserError, match="runs: a link that another user made"):
        make_directory(tmp_path / "runs" / "r")


def test_files_of_our_own_can_be_opened(tmp_path):
    with lock(tmp_path / "lock", "it"), open(tmp_path / "file", "a", opener=no_links) as file:
        file.write("x")
    assert (tmp_path / "file").read_text() == "x"
