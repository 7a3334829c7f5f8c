from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from tutelage.config.base import parse_tokens
from tutelage.errors import UserError
from tutelage.evals.domains import DOMAINS
from tutelage.models.shapes import find_shape
from tutelage.study.expand import expand
from tutelage.study.presets import load_study, preset_names

STEP = 256 * 8192
PAPER = [name for name in preset_names() if name.startswith("paper/")]

# Students of the experiment matrix (paper's count), then ours by kind: teachers, baselines, students, after.
# Baselines are counted apart; a study lists every run it needs, also those that another study shares.
RUNS = {
    "paper/teachers": (0, (28, 0, 0, 0)),
    "paper/mixing": (24, (4, 1, 24, 0)),
    "paper/student-size": (72, (4, 3, 72, 0)),
    "paper/teacher-tokens": (168, (28, 1, 168, 0)),
    "paper/longer-student": (48, (8, 2, 48, 0)),  # 24 and 24; "+1", the plain 300B run, is a baseline
    "paper/architecture": (66, (4, 4, 60, 0)),  # "~66": 60 students and 4 baselines are 64
    "paper/temperature": (40, (4, 1, 40, 0)),  # 8 of them, at T = 1, are cells of mixing
    "paper/top-k": (40, (4, 1, 44, 0)),  # 8 of the 40 are cells of mixing; 4 with sampled targets are ours
    "paper/loss-scale": (6, (1, 1, 6, 0)),
    # The matrix says both "every run above" and 109. The runs of mixing and student-size are the nearest
    # whole rows: 96 students and 4 baselines.
    "paper/post-training": (96, (4, 4, 96, 100)),
    "paper/controls": (60, (6, 6, 52, 0)),  # "~60": 52 students, 6 baselines, 2 teachers of its own
}


def by_kind(name):
    found = Counter(cell.kind for cell in expand(load_study(name)).cells)
    return tuple(found[kind] for kind in ("teacher", "baseline", "student", "after"))


def test_every_row_of_the_matrix_has_its_runs():
    assert {name: by_kind(name) for name in PAPER} == {name: ours for name, (_, ours) in RUNS.items()}


@pytest.mark.parametrize("name", PAPER)
def test_run_counts_are_the_papers_or_the_table_says_why(name):
    papers, (_, baselines, students, _) = RUNS[name]
    explained = {"paper/architecture": 2, "paper/controls": 0}
    if name in explained:
        own_teachers = 2 if name == "paper/controls" else 0
        assert papers - (students + baselines + own_teachers) == explained[name]
    else:
        assert students - (4 if name == "paper/top-k" else 0) == papers


def test_a_cell_of_two_presets_is_one_run():
    cells = {name: {cell.name: cell for cell in expand(load_study(name)).cells} for name in PAPER}
    for small, large in (
        ("paper/teachers", "paper/teacher-tokens"),
        ("paper/mixing", "paper/teacher-tokens"),
        ("paper/mixing", "paper/post-training"),
        ("paper/student-size", "paper/post-training"),
    ):
        assert cells[small].keys() <= cells[large].keys()
    shared = Counter(name for preset in cells.values() for name in preset)
    for name, times in shared.items():
        same = [preset[name] for preset in cells.values() if name in preset]
        assert len(same) == times
        if not any("qwen3" in cell.shape for cell in same):  # another tokenizer, and another shape's name
            assert all(cell.settings == same[0].settings for cell in same)
            assert len({(cell.needs, cell.baseline) for cell in same}) == 1
    one_t = {n for n, cell in cells["paper/temperature"].items() if cell.kind == "student"} & set(
        cells["paper/mixing"]
    )
    assert len(one_t) == 8
    # The matrix adds up to about 660, with the 24 of mixing and 16 of temperature and top-k counted twice;
    # 4 are our own.
    assert len(shared) == 623


@pytest.mark.parametrize("name", PAPER)
def test_hyper_parameters_are_the_papers(name):
    for cell in expand(load_study(name)).cells:
        optim, data = cell.settings["optim"], cell.settings["data"]
        expected = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "schedule": "cosine"}
        assert {key: optim[key] for key in expected} == expected
        assert (optim["final_lr"], cell.settings["dtype"]) == (0.1, "bfloat16")
        if cell.kind == "after":
            assert (optim["lr"], optim["warmup"], data["sequence_length"]) == (1e-5, 0.01, 4096)
            assert parse_tokens(cell.tokens) == 4000 * cell.settings["global_batch_tokens"]
            continue
        assert find_shape(cell.shape).lr == (5e-4 if cell.shape.startswith("qwen3") else 3e-4)
        assert "lr" not in optim
        assert (optim["warmup"], data["sequence_length"]) == (0.05, 8192)
        assert cell.settings["global_batch_tokens"] == STEP
        steps, rest = divmod(parse_tokens(cell.tokens), STEP)
        assert rest == 0
        assert steps % 2500 == 0
        assert cell.seed == 42 if cell.kind == "teacher" else cell.seed in range(43, 48)


def test_domains_are_those_of_the_paper_suite():
    study = load_study("paper/mixing")
    assert {study.in_domain, *study.domains} == {n for n, d in DOMAINS.items() if d.suite == "paper"}
    for name, spec in study.domains.items():
        assert (spec.source, spec.max_bytes) == (DOMAINS[name].source, DOMAINS[name].max_bytes)


def test_the_text_is_enough_for_the_longest_run():
    """At 5 bytes per token, more than any tokenizer of 128,256 entries gives on English."""
    study = load_study("paper/teacher-tokens")
    longest = max(parse_tokens(cell.tokens) for cell in expand(study).cells)
    assert study.corpus.max_bytes / 5 > longest


EXPAND = """
import sys, time
from pathlib import Path
from tutelage.study.expand import expand
from tutelage.study.nodes import Stores, bind
from tutelage.study.presets import load_study, preset_names
store, began, runs, loaded = Path(sys.argv[1]), time.process_time(), set(), []
studies = [load_study(name) for name in preset_names() if name.startswith("paper/")]
given = lambda study: any(teacher.model for teacher in study.teachers.values())  # its cost is its config's
for study in sorted(studies, key=given):
    domains, stages = (dict.fromkeys(names, store) for names in (study.domains, study.post_training))
    stores = Stores(store, domains, {}, stages)
    runs |= {node.id for node in bind(expand(study), stores, Path("runs"), 128_256)}
    if "torch" in sys.modules:
        loaded.append(study.name)
    else:
        seconds = time.process_time() - began
print(len(runs), seconds, *loaded)
"""


def test_the_whole_matrix_expands_in_seconds_and_loads_torch_for_a_given_model_alone(store, tmp_path):
    repository = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B"  # as the Hub's cache holds it
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit := "a" * 40)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", EXPAND, store],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    runs, seconds, *torch = done.stdout.split()
    assert torch == ["paper-controls"]  # beside a model of the Hub
    assert int(runs) == 623
    assert float(seconds) < 5.0  # of this process's own time, whatever else the machine does
    assert time.perf_counter() - began < 60


def test_a_preset_that_is_none_is_named():
    with pytest.raises(UserError, match="did you mean 'paper/mixing'"):
        load_study("paper/mixin")
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_study("nowhere.yaml")
