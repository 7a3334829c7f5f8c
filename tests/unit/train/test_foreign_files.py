"""Files that nobody expects, anywhere in a run or a study, are ignored or named; nothing is lost by them."""

from __future__ import annotations

import json
import shutil
from importlib import import_module

import pytest
import synthetic_study
from safetensors.torch import load_file, save_file
from training import StopAt, losses

from tutelage.cli.study_output import print_status
from tutelage.config.teacher_config import TeachConfig
from tutelage.errors import Stopped, UserError
from tutelage.files import lock
from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id
from tutelage.study.leases import Failures, Leases
from tutelage.study.results import load_results
from tutelage.study.status import read_status, retry_runs
from tutelage.teachers.cache.job import load_job, plan_cache

FILES = ("state.json", "metrics.jsonl", "config.yaml", "provenance.json", "scores.jsonl", "documents.parquet")


@pytest.fixture(scope="module")
def stopped(tiny_config, tmp_path_factory):
    """A run that was stopped after step 9, what it becomes, and a function that makes its config."""
    place = tmp_path_factory.mktemp("stopped")
    log = {"runtime": {"device": "cpu", "threads": 1, "log_every": 4}}
    with pytest.raises(Stopped):
        run(tiny_config(place / "cut", **log), StopAt(9))
    whole = run(tiny_config(place / "whole", **log))
    return RunDirectory(place / "cut" / whole.id), whole, lambda output: tiny_config(output, **log)


def model(directory):
    return (directory.model / "model.safetensors").read_bytes()


def test_a_stop_leaves_no_row_of_its_own(stopped, tmp_path):
    cut, whole, config = stopped
    assert cut.status() == "stopped"
    assert cut.state()["step"] == 9 == max(cut.saved())
    assert [row["step"] for row in losses(cut)] == [4, 8]
    shutil.copytree(cut.path.parent, tmp_path / "runs")
    again = run(config(tmp_path / "runs"))
    assert losses(again) == losses(whole)
    assert model(again) == model(whole)


def test_other_names_are_no_checkpoints_and_stay(stopped, tmp_path):
    cut, whole, config = stopped
    shutil.copytree(cut.path.parent, tmp_path / "runs")
    directory = RunDirectory(tmp_path / "runs" / cut.id)
    for name in ("step-old", "step-12 (copy)", "step-", "step-000000012.bak", "branch-point-step-old"):
        (directory.checkpoints / name).mkdir()
    for place in (directory.path, directory.checkpoints, tmp_path / "runs"):
        for name in ("notes.txt", ".DS_Store", "step-000000099"):
            (place / name).write_text("mine")
    for name in (".state.json.12-0123abcd", ".config.yaml.99999-ffffffff"):  # of writers that were killed
        (directory.path / name).write_text("{")
    before = {
        path for path in (tmp_path / "runs").rglob("*") if path.is_file() if path.read_bytes() == b"mine"
    }
    again = run(config(tmp_path / "runs"))
    assert (losses(again), model(again)) == (losses(whole), model(whole))
    assert before <= set((tmp_path / "runs").rglob("*"))
    assert (directory.checkpoints / "step-old").is_dir()
    assert not list(directory.path.glob(".state*")) + list(directory.path.glob(".config*"))


@pytest.mark.parametrize("name", ["state.json", "metrics.jsonl", "config.yaml", "checkpoints", "lock"])
def test_something_else_in_the_place_of_a_file_is_named(stopped, tmp_path, name):
    cut, _, config = stopped
    shutil.copytree(cut.path.parent, tmp_path / "runs")
    place = tmp_path / "runs" / cut.id / name
    if name == "checkpoints":
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("mine")
    else:
        place.unlink(missing_ok=True)
        place.mkdir()
        (place / "mine").touch()
    with pytest.raises(UserError) as caught:
        run(config(tmp_path / "runs"))
    assert str(place) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert place.is_file() or list(place.iterdir())


def test_a_run_that_is_refused_leaves_no_trace(make_config, tmp_path):
    refused = make_config(teacher={"kind": "run", "run": "nobody-12345678"}, objective={"alpha": 0.5})
    with pytest.raises(UserError, match="train that run"):
        run(refused)
    assert not (tmp_path / "runs").exists()
    good = run(make_config())
    with pytest.raises(UserError, match="train that run"):
        run(refused)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [good.id]
    (good.model / "config.json").unlink()
    shutil.rmtree(good.checkpoints / "step-000000012")
    next((good.checkpoints / "step-000000008").glob("shard-*")).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be resumed from"):  # it has begun: the reason is kept
        run(make_config())
    assert "cannot be resumed from" in good.state()["error"]
    assert good.status() == "failed"


def test_a_given_model_that_is_written_while_it_is_read_is_refused(make_config, store, tmp_path, monkeypatch):
    given = make_config(name="given")
    model = shutil.copytree(run(given).model, tmp_path / "model")
    (model / "checksums.json").unlink()
    stages = import_module("tutelage.run")  # `tutelage.run` is the function
    opened = stages.open_teacher

    def changed(*how):
        teacher = opened(*how)
        weights = load_file(model / "model.safetensors")
        save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors")
        return teacher

    taught = make_config(teacher={"kind": "model", "path": str(model)}, objective={"alpha": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr(stages, "open_teacher", changed)
        with pytest.raises(UserError, match="model: its files were changed while they were read; run the"):
            run(taught)
    assert run_id(taught) == run(taught).id  # of what lies there now

    teach = TeachConfig(store=store, teacher=taught.teacher, context_length=32)
    plan = plan_cache(teach)
    (model / "config.json").touch()
    with pytest.raises(UserError, match="its files were changed while they were read"):
        load_job(plan)
    load_job(plan_cache(teach))


def test_one_that_waits_for_a_lock_does_not_lose_its_directory(make_config):
    config = make_config()
    directory = RunDirectory(config.output / run_id(config))
    directory.path.mkdir(parents=True)
    with lock(directory.path / "lock", "another"), pytest.raises(UserError, match="already working"):
        run(config)
    assert directory.path.exists()
    with directory.lock():
        assert directory.path.exists()
    assert not directory.path.exists()


@pytest.mark.parametrize("how", ["directory", "junk", "empty", "binary"])
def test_a_study_is_read_whatever_lies_in_it(tmp_path, how):
    study = synthetic_study.write_study(tmp_path / "study", seeds=(43, 44))
    runs = sorted((study / "runs").iterdir())
    for path, name in zip(runs[-len(FILES) :], FILES, strict=True):  # students: each loses another file
        (path / name).unlink(missing_ok=True)
        if how == "directory":
            (path / name).mkdir()
        else:
            (path / name).write_bytes({"junk": b'{"status": 7}\n', "empty": b"", "binary": b"\x00\xff"}[how])
    (study / "runs" / "notes.txt").write_text("mine")
    with Leases(study):
        pass
    Failures(study, 1).add(runs[0].name, "too hot", 0)
    for folder in ("leases", "runners", "failures"):
        for name in ("notes.txt", "x.1.json", f"{runs[1].name}.json", ".DS_Store"):
            (study / "queue" / folder / name).write_text("mine")
        (study / "queue" / folder / "y.2.json").mkdir()
        (study / "queue" / folder / f"{runs[2].name}.3.json").mkdir()
        (study / "queue" / folder / f"{runs[3].name}.json").mkdir()
    status = read_status(study)
    print_status(status, study)
    assert sum(status.counts.values()) == len(load_results(study).plan.runs)
    found = load_results(study)
    damaged = runs[-len(FILES)]
    assert any(damaged.name in problem and "state.json" in problem for problem in found.problems)
    assert found.runs.filter(run=damaged.name)["status"].item() != "done"
    assert RunDirectory(damaged).status() == "stopped"
    assert retry_runs(study, []) == [runs[0].name, runs[1].name]


def test_state_and_report_say_the_same_of_a_lost_model(tmp_path):
    study = synthetic_study.write_study(tmp_path / "study", seeds=(43, 44))
    lost = min((study / "runs").iterdir())
    assert RunDirectory(lost).status() == "done"  # results without weights
    (lost / "checkpoints" / "step-000000004").mkdir(parents=True)
    assert RunDirectory(lost).status() == "stopped"
    assert read_status(study).counts["stopped"] == 1
    assert load_results(study).runs.filter(run=lost.name)["status"].item() == "stopped"
    assert json.loads((lost / "state.json").read_text())["status"] == "done"
