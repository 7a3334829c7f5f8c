"""`eval.every`: a run is scored while it trains, which changes nothing but its `scores.jsonl`."""

from __future__ import annotations

import time

import polars as pl
import pytest
from safetensors.torch import load_file
from training import Notes, StopAt

from tutelage.errors import Stopped, UserError
from tutelage.evals import evaluate
from tutelage.models import hub
from tutelage.run import run, run_cohort

EVERY = 5 * 256
KEY = ["domain", "split", "metric", "version", "step"]


@pytest.fixture
def evaluation(store, other_store):
    return {
        "domains": [
            {"name": "speeches", "store": str(store), "role": "in_domain"},
            {"name": "scripture", "store": str(other_store)},
        ],
        "max_documents": 4,
        "max_tokens": 80,
    }


def weights(directory):
    return (directory.model / "model.safetensors").read_bytes()


def test_weights_are_the_same_to_the_bit_and_so_is_the_run(make_config, evaluation, tmp_path):
    teacher = {"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.3}}
    plain = run(make_config(eval=evaluation, **teacher))
    watched = run(
        make_config(eval=evaluation | {"every": EVERY}, output=str(tmp_path / "watched"), **teacher)
    )
    assert watched.id == plain.id
    assert weights(watched) == weights(plain)
    state = "checkpoints/step-000000012/shard-00001.safetensors"
    ours, theirs = (load_file(directory.path / state) for directory in (watched, plain))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())
    rows = pl.read_ndjson(watched.scores)
    assert rows["step"].unique().sort().to_list() == [5, 10, 12]
    assert rows.filter(step=5)["tokens"].unique().to_list() == [EVERY]
    assert rows.select(KEY).is_unique().all()
    last = rows.filter(step=12).drop("run")
    assert last.equals(pl.read_ndjson(plain.scores).drop("run"))
    assert pl.read_parquet(watched.documents).equals(pl.read_parquet(plain.documents))


def test_a_score_on_the_way_is_that_of_a_run_that_ends_there(make_config, evaluation, tmp_path):
    constant = {"optim": {"schedule": "constant", "warmup": 0.0}}
    long = run(make_config(eval=evaluation | {"every": EVERY}, **constant))
    short = run(make_config(eval=evaluation, tokens=EVERY, output=str(tmp_path / "short"), **constant))
    columns = ["domain", "split", "metric", "version", "value", "n", "low", "high"]
    ours = pl.read_ndjson(long.scores).filter(step=5).select(columns)
    assert ours.equals(pl.read_ndjson(short.scores).select(columns))


@pytest.mark.parametrize("stop", [5, 7])
def test_a_stopped_run_scores_what_is_missing_and_nothing_twice(make_config, evaluation, tmp_path, stop):
    """A stop right at a step that is due leaves its scores to the next session."""
    config = make_config(eval=evaluation | {"every": EVERY}, checkpoint={"every": 4 * 256})
    with pytest.raises(Stopped):
        run(config, StopAt(stop))
    resumed = run(config)
    whole = run(config.model_copy(update={"output": tmp_path / "whole"}))
    assert weights(resumed) == weights(whole)
    assert pl.read_ndjson(resumed.scores).equals(pl.read_ndjson(whole.scores))


def test_scores_that_are_there_are_not_computed_again(make_config, evaluation, monkeypatch):
    config = make_config(eval=evaluation | {"every": EVERY})
    directory = run(config)
    before = directory.scores.read_bytes()
    monkeypatch.setattr(evaluate, "score_domain", None)
    assert evaluate.score_run(config, directory, hub.load(str(directory.model)), 5, finished=False) == []
    run(config)
    assert directory.scores.read_bytes() == before


def test_every_run_of_a_cohort_is_scored(make_config, evaluation):
    configs = [
        make_config(name=name, seed=seed, eval=evaluation | {"every": EVERY})
        for name, seed in (("a", 1), ("b", 2))
    ]
    for directory in run_cohort(configs):
        assert pl.read_ndjson(directory.scores)["step"].unique().sort().to_list() == [5, 10, 12]


def test_progress_is_told_the_scores(make_config, evaluation):
    progress = Notes()
    directory = run(make_config(eval=evaluation | {"every": EVERY}), progress)
    rows = pl.read_ndjson(directory.scores).filter(step=5, split="validation", metric="bits_per_byte")
    value = rows.filter(domain="speeches")["value"].item()
    assert progress.notes[0].startswith(
        f"step 5, bits per byte of validation text: speeches {value:.3f}, scripture "
    )
    assert len(progress.notes) == 2


@pytest.mark.parametrize("students", [1, 2])
def test_time_for_scoring_is_not_training_time(make_config, evaluation, monkeypatch, students):
    clock = [0.0]

    def slow(*arguments, **settings):
        clock[0] += 1000.0
        return []

    real = time.perf_counter
    monkeypatch.setattr("tutelage.train.loop.time.perf_counter", lambda: real() + clock[0])
    monkeypatch.setattr(evaluate, "score_run", slow)
    configs = [make_config(eval=evaluation | {"every": EVERY}, seed=seed) for seed in range(students)]
    directories = run_cohort(configs)
    assert clock[0] == 3000.0 * students
    assert all(directory.state()["seconds"] < 500 for directory in directories)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": "often"}, "not a token budget"),
        ({"every": "2x"}, "no meaning here"),
        ({"domains": [], "every": "1M"}, "eval.domains is empty"),
    ],
)
def test_what_makes_no_sense_is_said(make_config, evaluation, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(eval=evaluation | changes)
