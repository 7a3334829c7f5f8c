"""`tutelage runs` and `tutelage show`: states, scores, what differs, 80 columns, JSON, all four kinds."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tutelage.config.load import load
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.store import open_store
from tutelage.evals.score_files import add_scores
from tutelage.files import is_locked, lock
from tutelage.run_directory import RunDirectory
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.types import Score


def score(domain, value, **changes):
    row = Score(
        run="x", step=20, tokens=2000, domain=domain, role="out_of_domain", split="test",
        metric="bits_per_byte", value=value, stderr=0.1, n=3, higher_is_better=False, version="1-x",
    )  # fmt: skip
    return Score(**asdict(row) | changes)


def make(name, number, status, step=20, error=None, **settings):
    directory = RunDirectory(Path("runs", name))
    directory.path.mkdir(parents=True)
    (directory.path / "config.yaml").write_text(yaml.safe_dump({"name": name, "tokens": 2000, **settings}))
    directory.write_state(status, step=step, steps=20, error=error)
    os.utime(directory.path / "state.json", (1_000_000 + number, 1_000_000 + number))
    return directory


@pytest.fixture
def listed(command):
    done = make("teacher-11111111", 1, "done", seed=42, optim={"lr": 0.1})
    add_scores(
        done.scores,
        [
            score("speeches", 2.5),
            score("kjv", 3.25),
            score("kjv", 9.0, step=10),
            score("kjv", 8.0, split="validation"),
        ],
    )
    make("student-22222222", 2, "failed", 7, "UserError: no room " + "x" * 90, seed=43, optim={"lr": 0.1})
    make("student-33333333", 3, "running", 11, seed=43, optim={"lr": 0.2})
    make("student-44444444", 4, "running", 12, seed=43, optim={"lr": 0.2}, objective={"alpha": 0.4})
    Path("runs/caches").mkdir()  # no run
    return command


def test_runs_are_listed_newest_first_in_80_columns(listed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with lock(Path("runs/student-44444444/lock"), "x"):
        assert is_locked(Path("runs/student-44444444/lock"))
        code, text, _ = listed("runs")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    heads = [line.split("  ")[:2] for line in text.splitlines() if line.startswith(("teacher", "student"))]
    assert [name for name, _ in heads] == [
        "student-44444444",
        "student-33333333",
        "student-22222222",
        "teacher-11111111",
    ]
    states = [words.split(",")[0] for _, words in heads]
    assert states == ["running", "killed", "failed", "done"]
    assert "11 of 20 steps" in text
    assert "bits per byte: speeches 2.500, kjv 3.250\n" in text
    assert "objective.alpha 0.4, optim.lr 0.2, seed 43\n" in text
    assert "tokens" not in text
    assert "no room" in text


def test_the_list_as_json(listed):
    code, text, _ = listed("runs", "runs", "--json")
    rows = json.loads(text)
    assert code == 0
    assert rows[-1]["scores"] == {"speeches": 2.5, "kjv": 3.25}
    assert rows[0]["differs"] == {"seed": 43, "optim.lr": 0.2, "objective.alpha": 0.4}
    assert rows[1]["state"] == "killed"


def test_a_directory_that_is_not_there_is_said(listed):
    code, _, complaint = listed("runs", "nowhere")
    assert code == 2
    assert complaint == "error: nowhere: no such directory; `tutelage train` puts runs into runs/\n"


def test_every_kind_is_shown_by_its_name(listed, store):
    shutil.copytree(store, Path("stores", store.name))
    Path("teach.yaml").write_text("store: speeches\nteacher: {kind: unigram}\nbatch_tokens: 65536\n")
    cache = write_cache(load(TeachConfig, Path("teach.yaml")))
    for name, wanted in {
        "speeches": "vocabulary 300",
        str(store): "vocabulary 300",
        "cache": "sample_min_variance",
        "teacher": "done, 20 of 20 steps",
        "student-2": "no room",
    }.items():
        code, text, complaint = listed("show", name)
        assert (code, complaint) == (0, ""), name
        assert wanted in text
    assert listed("show", "cache", "--path") == (0, f"{cache}\n", "")
    assert listed("data", "show", "cache")[0] == 0
    code, _, complaint = listed("show", "student")
    assert code == 2
    assert "3 runs are called so" in complaint
    assert "optim.lr 0.2" in complaint
    assert "no store, run, cache or study is called so" in listed("show", "nobody")[2]
    shutil.copytree("runs/teacher-11111111", "runs/speeches-12121212")
    assert "(a store), runs/speeches-12121212 (a run); write the path" in listed("show", "speeches")[2]


def test_the_version_is_told(command):
    code, text, _ = command("--version")
    assert code == 0
    assert text.startswith("tutelage 0.")


def test_a_default_that_only_one_run_writes_down_is_no_difference(listed):
    """A later version writes more settings, most of them as they always were."""
    base = {"name": "a", "model": {"shape": "nano-50k"}, "data": {"store": "s"}, "tokens": "40K", "seed": 1}
    later = base | {"seed": 2, "optim": {"clip": 1.0, "schedule": "cosine", "weight_decay": 0.3}}
    for name, config in (("a-00000001", base), ("a-00000002", later)):
        Path("two", name).mkdir(parents=True)
        Path("two", name, "config.yaml").write_text(yaml.safe_dump(config))
    code, text, _ = listed("runs", "two", "--json")
    assert code == 0
    differs = {row["run"]: row["differs"] for row in json.loads(text)}
    assert differs == {"a-00000001": {"seed": 1}, "a-00000002": {"seed": 2, "optim.weight_decay": 0.3}}


def test_a_run_whose_state_is_damaged_is_not_said_to_have_never_begun(listed):
    state = Path("runs/teacher-11111111/state.json")
    state.write_text(state.read_text()[:40])
    for command in (("show", "teacher"), ("runs",)):
        code, text, _ = listed(*command)
        words = " ".join(text.split())
        assert code == 0
        assert re.search("teacher-11111111:? how far it is cannot be read", words)
        assert "runs/teacher-11111111/state.json is damaged; the same `tutelage train`" in words
        assert "not started" not in words
        assert "goes on" not in words
        assert "speeches 2.500" in words
    row = next(row for row in json.loads(listed("runs", "--json")[1]) if row["run"] == "teacher-11111111")
    assert row["state"] == "damaged"


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_number_of_a_store_is_cut(listed, store, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shutil.copytree(store, Path("stores", store.name))
    code, text, _ = listed("show", "speeches")
    opened = open_store(store)
    assert code == 0
    assert "…" not in text
    for split in opened.manifest.splits.values():
        assert {f"{split.tokens:,}", f"{split.bytes:,}"} <= set(text.split())
    tables = text.partition("fingerprint")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= width
