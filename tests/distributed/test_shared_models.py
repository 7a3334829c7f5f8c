"""Processes that share a teacher or a starting model get what one process gets: logits, losses, weights."""

from __future__ import annotations

import json
import subprocess
import sys

import loading_memory
import pytest
import shared_models
from tiny_families import tiny_model
from training import assert_same_weights, rows

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.models import hub
from tutelage.models.shapes import find_shape
from tutelage.run_directory import RunDirectory, run_id
from tutelage.teachers.cache.cache_writer import write_cache

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gpt2", "mixtral", "gemma2", "phi", "qwen3_moe", "cohere", "falcon")
"""A head of its own, position tables, experts, a softcap, a bias of the head, more experts, a scale."""


def started(*arguments):
    command = [sys.executable, shared_models.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_shared_teacher_gives_the_logits_of_a_whole_one_whatever_its_family(tmp_path):
    for family in FAMILIES:
        tiny_model(family, tmp_path / family)
    started("families", tmp_path)


@pytest.fixture
def wide(store, tmp_path):
    """A teacher of another width than the student's, with more rows than the vocabulary."""
    hub.save(hub.build(find_shape("nano-350k"), 310, 32, seed=9), tmp_path / "wide", store)
    return {"kind": "model", "path": str(tmp_path / "wide")}


@pytest.fixture
def cached(store, wide, tmp_path):
    """What that teacher says, kept on disk."""
    settings = {
        "store": str(store),
        "teacher": wide,
        "context_length": 32,
        "output": str(tmp_path / "caches"),
        "format": {"kind": "topk", "k": 12},
        "batch_tokens": 1024,
    }
    return {"kind": "cache", "path": str(write_cache(validate(TeachConfig, settings, "test")))}


def test_several_processes_train_what_one_trains(make_config, store, wide, cached, tmp_path):
    hub.save(tiny_model("gemma2", tmp_path / "unused"), tmp_path / "start", store)
    live, kept = ({"teacher": one, "objective": {"alpha": 0.4}} for one in (wide, cached))
    begun = {"model": {"path": str(tmp_path / "start")}, "optim": {"lr": 1e-3}}
    hybrid = {"parallel": {"replicate": 2}}
    small = {"micro_batch_tokens": 64}
    asked = [
        ("live", 1, live),
        ("live shared", 2, live),
        ("live replicated", 2, live | {"teacher": wide | {"placement": "replicate"}}),
        ("live gathered once", 2, live | small | {"teacher": wide | {"reshard_after_forward": False}}),
        ("live hybrid", 4, live | hybrid),
        ("kept", 1, kept),
        ("kept two", 2, kept),
        ("kept four", 4, kept | small),
        ("begun", 1, begun),
        ("begun shared", 2, begun),
        ("begun hybrid", 4, begun | hybrid),
    ]
    lines, directories = [], {}
    for name, processes, changes in asked:
        config = make_config(**changes, tokens=6 * 256, output=str(tmp_path / name))
        lines.append(json.dumps([processes, config.model_dump_json()]))
        directories[name] = RunDirectory(config.output / run_id(config))
    (tmp_path / "runs").write_text("\n".join(lines))
    started("runs", tmp_path / "runs")
    for name, directory in directories.items():
        assert_alike(directories[name.split()[0]], directory)
    assert_same_weights(directories["live shared"], directories["live replicated"])  # bit for bit


def assert_alike(first, second):
    assert first.id == second.id
    for a, b in zip(rows(first), rows(second), strict=True):
        for key in a:
            if key.startswith(("loss", "ce", "kd", "teacher_ce")):
                assert a[key] == pytest.approx(b[key], rel=1e-5), key
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(first, second, rtol=1e-3, atol=2e-4)


def test_a_process_never_holds_more_than_its_slices_and_a_weight(tmp_path):
    command = [sys.executable, loading_memory.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] > 0.9 * found["size"] > 100  # MiB
    assert found["quarter"] < 0.5 * found["size"]
