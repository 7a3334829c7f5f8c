"""What a run has seen is followed through runs, models and caches, from any directory."""

from __future__ import annotations

import itertools
import shutil
from functools import partial

import polars as pl
import pytest

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import load, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.evals.contamination import read_again, training_text
from tutelage.run import run
from tutelage.teachers.cache.cache_writer import write_cache


@pytest.fixture(scope="module")
def make_config(tiny_config, tmp_path_factory):
    """Configs of runs that lie beside each other, so that one can name another."""
    return partial(tiny_config, tmp_path_factory.mktemp("outputs") / "runs")


@pytest.fixture(scope="module")
def known(store, other_training):
    return {open_store(store).fingerprint: "speeches", open_store(other_training).fingerprint: "scripture"}


def scripture(store, folder, share):
    """Scripture in the speeches' tokenizer, two shares of it held out."""
    settings = {
        "name": "scripture",
        "sources": [{"kind": "corpus", "name": "kjv"}],
        "tokenizer": {"path": str(store)},
        "validation": share,
        "test": share,
        "max_bytes": 200_000,
    }
    return build_store(validate(StoreConfig, settings, "test"), folder)


@pytest.fixture(scope="module")
def other_training(store, tmp_path_factory):
    return scripture(store, tmp_path_factory.mktemp("stores"), 0.1)


def scored(path):
    domains = [{"name": "scripture", "store": str(path)}]
    return {"domains": domains, "max_documents": 4, "max_tokens": 60}


@pytest.fixture(scope="module")
def first(make_config, other_training):
    """A run on scripture."""
    return run(make_config(name="first", data={"store": str(other_training), "sequence_length": 32}))


def seen(directory, known):
    text = training_text(load(RunConfig, directory.path / "config.yaml"), directory.path)
    return (
        [known[s.fingerprint] for s in text.stores],
        [known[s.fingerprint] for s in text.teachers],
        text.unknown,
    )


@pytest.mark.parametrize("how", ["run", "path"])
def test_a_run_that_goes_on_from_another_has_seen_its_text(make_config, first, other_training, known, how):
    start = first.id if how == "run" else str(first.model)
    seed = {"run": 1, "path": 2}[how]  # or both would be one run
    directory = run(make_config(model={how: start}, seed=seed, eval=scored(other_training)))
    assert seen(directory, known) == (["speeches", "scripture"], [], ())
    rows = pl.read_ndjson(directory.scores)
    assert set(rows["role"]) == {"in_domain"}
    assert rows.filter(metric="overlap_documents")["value"].to_list() == [0.0]


@pytest.mark.parametrize("how", ["run", "path"])
def test_a_run_that_reads_again_what_it_goes_on_from_has_read_is_told(make_config, store, first, how):
    """By default the second reads the same text in the same order: its first batches are the first's."""
    start = {how: first.id if how == "run" else str(first.model)}
    text = {"store": str(first.config().data.store), "sequence_length": 32}

    def told(**changes):
        config = make_config(model=start, data=text | changes)
        return [*read_again(config, config.output / "second")]

    (note,) = told()
    assert note.startswith(f"{first.id}, which this run continues, has read this text in this order")
    assert told(seed=7) == told(sequence_length=64) == told(store=str(store)) == []


@pytest.mark.parametrize("how", ["run", "model", "cache"])
def test_what_a_teacher_has_seen_is_told_apart(
    make_config, store, first, other_training, known, tmp_path, how
):
    teacher = {"run": {"kind": "run", "run": first.id}, "model": {"kind": "model", "path": str(first.model)}}
    if how == "cache":
        config = TeachConfig(
            store=store, teacher=make_config(teacher=teacher["run"], objective={"alpha": 0.5}).teacher,
            context_length=32, format={"kind": "topk", "k": 8}, runs=first.path.parent,
            output=tmp_path / "caches", device="cpu",
        )  # fmt: skip
        teacher["cache"] = {"kind": "cache", "path": str(write_cache(config))}
    again = scripture(store, tmp_path, 0.4)  # another split: much of it is what the teacher was trained on
    seed = {"run": 1, "model": 2, "cache": 3}[how]
    config = make_config(teacher=teacher[how], seed=seed, objective={"alpha": 0.5}, eval=scored(again))
    directory = run(config)
    assert seen(directory, known) == (["speeches"], ["scripture"], ())
    rows = pl.read_ndjson(directory.scores).filter(split="test")
    assert set(rows["role"]) == {"out_of_domain"}
    shares = dict(rows.select("metric", "value").iter_rows())
    trained = {*texts(open_store(other_training), "train")}
    held_out = {*texts(open_store(again), "test")}
    assert 0 < shares["teacher_overlap_documents"] == len(held_out & trained) / len(held_out)
    assert shares["overlap_documents"] == 0.0


def texts(store, split):
    view = store.split(split)
    bounds = itertools.pairwise(view.offsets[:, 0].astype(int))
    return [view.tokens[start:end].tobytes() for start, end in bounds]


def test_a_model_from_elsewhere_is_named(make_config, first, tmp_path, known):
    model = shutil.copytree(first.model, tmp_path / "somewhere" / "model")
    directory = run(make_config(model={"path": str(model)}, seed=3))
    stores, _, unknown = seen(directory, known)
    assert stores == ["speeches"]
    assert len(unknown) == 1
    end = "(it is the model of no run, so nothing names it)"
    assert unknown[0] == f"training text of {model}, which {directory.id} continues, is not known {end}"


def test_a_store_named_relatively_is_found_from_elsewhere_and_after_a_move(
    make_config, store, known, tmp_path, monkeypatch
):
    home = tmp_path / "home"
    shutil.copytree(store, home / "stores" / "speeches")
    monkeypatch.chdir(home)
    data = {"store": "stores/speeches", "sequence_length": 32}
    relative = run(make_config(data=data, output="runs"))
    mixed = run(make_config(data=data, output=str(home / "other" / "runs"), name="mixed"))
    paths = [relative.path.absolute(), mixed.path]
    monkeypatch.chdir("/")
    for path in paths:
        text = training_text(load(RunConfig, path / "config.yaml"), path)
        assert ([known[s.fingerprint] for s in text.stores], text.unknown) == (["speeches"], ())
    moved = home.rename(tmp_path / "away")
    for path in paths:
        place = moved / path.relative_to(home)
        text = training_text(load(RunConfig, place / "config.yaml"), place)
        assert ([known[s.fingerprint] for s in text.stores], text.unknown) == (["speeches"], ())
        assert text.own is not None
