"""Hints that are commands work when they are typed as they stand, whatever paths are called."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from synthetic_study import write_study

from tutelage.cli.bars import out
from tutelage.cli.study_output import print_status
from tutelage.cli.train_commands import _write
from tutelage.config.load import load
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.study.leases import Leases
from tutelage.study.status import read_status
from tutelage.teachers.cache.cache_writer import write_cache

ODD = "it's, a {study}"


def typed(shown: str) -> list[str]:
    """The words after `tutelage` of the last command that is shown."""
    return shlex.split(re.findall(r"`tutelage (.*?)`", " ".join(shown.split()))[-1])


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / ODD)
    return Path(ODD)


def test_what_is_next_for_a_study_can_be_typed(study, command):
    code, shown, _ = command("show", study)
    assert code == 0
    assert typed(shown) == ["report", ODD]
    assert command("study", "status", study)[1] == shown
    for words in (["stop"], ["retry"]):
        code, shown, _ = command("study", *words, study)
        assert code == 0
        assert typed(shown) == ["study", "status", ODD]
        assert command(*typed(shown))[0] == 0


def test_what_is_next_for_a_plan_is_run_in_the_directory_that_it_asked(study, command):
    words = ["demo", "title=why, though", "--output", ODD]
    code, shown, _ = command("study", "plan", *words)
    assert code == 0
    assert shlex.split(re.search(r"next +tutelage (.*)", shown)[1]) == ["study", "run", *words]


def test_a_study_at_work_is_stopped_by_what_its_status_says(study):
    run = read_status(study)
    (study / "runs" / (name := next((study / "runs").iterdir()).name) / "state.json").unlink()
    with Leases(study) as leases, out.capture() as shown:
        leases.acquire(name, "recipe")
        print_status(read_status(study), study)
    assert typed(shown.get()) == ["study", "stop", ODD]
    assert run.active == []


def test_a_directory_without_a_study_is_given_as_it_must_be_typed(tmp_path, command):
    (tmp_path / ODD).mkdir()
    code, _, said = command("study", "status", ODD)
    assert code == 2
    assert typed(said) == ["study", "run", "FILE.yaml", "--output", ODD]


@pytest.mark.parametrize("kind", ["run", "study"])
def test_a_new_file_says_how_it_is_used(kind, tmp_path, command):
    file = f"{ODD}.yaml"
    code, shown, _ = command("init", kind, file)
    assert code == 0
    hint = re.search(r"then: (.*)", shown)[1]
    assert shlex.split(hint)[-1] == file
    assert hint in (tmp_path / file).read_text()
    if kind == "run":
        assert load(RunConfig, tmp_path / file).name == "student"
        assert command(*shlex.split(hint)[1:])[2].startswith("error: ")  # its store is not there


@pytest.fixture(scope="module")
def cached(store, tmp_path_factory):
    """A teacher's settings and the directory of its finished caches, which each name gets a copy of."""
    folder = tmp_path_factory.mktemp("caches")
    settings = {"store": store, "teacher": {"kind": "unigram"}, "context_length": 32, "device": "cpu"}
    write_cache(TeachConfig(**settings, output=folder))
    return settings, folder


@pytest.mark.parametrize("folder", ["plain", ODD, "a, b", "yes: #1"])
def test_a_cache_is_named_as_yaml_reads_it(folder, cached, tmp_path, capsys, monkeypatch):
    settings, finished = cached
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, folder)
    _write(TeachConfig(**settings, output=Path(folder)))
    (setting,) = re.findall(r"put '(teacher: .*)' into a run file", capsys.readouterr().out)
    teacher = yaml.safe_load(setting)["teacher"]
    assert teacher["kind"] == "cache"
    assert (Path(teacher["path"]) / "manifest.json").is_file()
    assert ("'" in setting or '"' in setting) == (folder != "plain")
