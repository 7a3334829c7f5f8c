"""One run has one id, however its settings are spelled; and what is trained is what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import Notes

from tutelage.config.load import load, to_yaml, validate
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.models.flops import parameters
from tutelage.models.shapes import LADDER
from tutelage.run import run, run_cohort
from tutelage.run_directory import run_id
from tutelage.teachers.cache.job import plan_cache


def text_of(store, **changes):
    settings = {
        "tokens": "40K",
        "lr": "1e-3",
        "warmup": "512",
        "weight_decay": "0.1",
        "store": str(store),
        "alpha": "0.4",
        "temperature": "2",
        "seed": "43",
    } | changes
    return """
model: {{shape: nano-50k}}
data: {{store: {store}, sequence_length: 32}}
tokens: {tokens}
seed: {seed}
global_batch_tokens: 256
optim: {{lr: {lr}, warmup: {warmup}, weight_decay: {weight_decay}}}
teacher: {{kind: unigram}}
objective: {{alpha: {alpha}, temperature: {temperature}}}
""".format(**settings)


SPELLED = [
    *(
        {"tokens": tokens}
        for tokens in ("40000", '"40000"', "40_000", "4e4", "4E+4", "0.04M", "'40K'", "40.0K")
    ),
    *({"lr": lr} for lr in ("0.001", ".001", "0.0010", "1E-3", "1.0e-3", "10e-4")),
    *({"warmup": warmup} for warmup in ("'512'", "5.12e2", "0.512K", "5_12")),
    *({"weight_decay": decay} for decay in ("1e-1", ".1", ".10")),
    *(
        {"alpha": alpha}
        for alpha in ("4e-1", "{policy: constant, value: .4}", "{value: 0.40, policy: constant}")
    ),
    *({"temperature": temperature} for temperature in ("2.0", "2e0", "20e-1")),
    {"seed": "4_3"},
]


@pytest.mark.parametrize("changes", SPELLED, ids=str)
def test_spellings_are_one_run(changes, store, tmp_path):
    def identity(**change):
        path = tmp_path / "run.yaml"
        path.write_text(text_of(store, **change))
        return run_id(load(RunConfig, path))

    assert identity(**changes) == identity()
    assert identity(tokens="39K") != identity()


def test_places_are_no_part_of_a_run(store, tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    link = tmp_path / "link"
    link.symlink_to(store)
    monkeypatch.chdir(store.parent)
    ids = set()
    for place in (store, f"{store}/", store.name, f"./{store.name}/", f"{store}/../{store.name}", link):
        path.write_text(text_of(place))
        ids.add(run_id(load(RunConfig, path)))
    assert len(ids) == 1
    code = (
        "import sys\nfrom pathlib import Path\nfrom tutelage.config.run_config import RunConfig\n"
        "from tutelage.config.load import load\nfrom tutelage.run_directory import run_id\n"
        "print(run_id(load(RunConfig, Path(sys.argv[1]))))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert elsewhere.stdout.strip() in ids


def test_what_the_shape_decides_may_be_written_out(make_config, store):
    size = parameters(LADDER["nano-50k"], open_store(store).vocab_size).total
    assert run_id(make_config(tokens="2x")) == run_id(make_config(tokens=2 * size))
    assert run_id(make_config(tokens="2.0x")) == run_id(make_config(tokens="2x"))
    assert run_id(make_config(optim={"lr": 6e-3})) == run_id(make_config())
    assert run_id(make_config(optim={"lr": 5e-3})) != run_id(make_config())
    plain = make_config()
    assert run_id(validate(RunConfig, plain.model_dump(mode="json"), "dump")) == run_id(plain)


def test_a_model_directory_is_its_content(make_config, tmp_path, monkeypatch):
    first = run(make_config())
    monkeypatch.chdir(first.path)
    link = tmp_path / "other-name"
    link.symlink_to(first.model)
    ids = {
        run_id(make_config(teacher={"kind": "model", "path": place}, objective={"alpha": 0.4}))
        for place in (str(first.model), f"{first.model}/", "model", "./model/", str(link))
    }
    assert len(ids) == 1
    caches = {
        plan_cache(
            TeachConfig(store=place, teacher={"kind": "model", "path": str(path)}, output=tmp_path / "caches")
        ).path
        for place in (first_store(first), Path(f"{first_store(first)}/"))
        for path in (first.model, "model", link)
    }
    assert len(caches) == 1
    with pytest.raises(UserError, match=r"teacher\.run = 'a/b'"):
        make_config(teacher={"kind": "run", "run": "a/b"}, objective={"alpha": 0.4})


def first_store(directory):
    return load(RunConfig, directory.path / "config.yaml").data.store


def test_tokens_that_are_no_whole_batches_are_said_and_left_out(make_config):
    listener = Notes()
    config = make_config(
        tokens=2000,
        global_batch_tokens=1024,
        checkpoint={"every": 1500},
    )
    directory = run(config, listener)
    state = json.loads((directory.path / "state.json").read_text())
    assert (state["tokens"], state["steps"]) == (1024, 1)
    assert "tokens = 2,000: 1,024 are trained, 1 whole batches of 1,024 tokens" in listener.notes


def test_intervals_that_are_no_whole_batches_are_said(make_config, store):
    domains = [{"name": "own", "store": str(store), "role": "in_domain"}]
    config = make_config(eval={"every": 600, "domains": domains}, checkpoint={"every": 1000})
    assert config.rounding(12, 1) == [
        "eval.every = 600: every 512 tokens, in whole batches of 256",
        "checkpoint.every = 1,000: every 768 tokens, in whole batches of 256",
    ]
    beyond = make_config(eval={"every": "1M", "domains": domains})
    assert beyond.rounding(12, 1) == [
        "eval.every = 1,000,000: the run has 3,072 tokens and is scored at its end"
    ]
    assert make_config().rounding(12, 1) == []


def test_less_than_a_batch_is_refused_before_anything_is_read(make_config):
    with pytest.raises(UserError, match="200 tokens are less than one batch of 256"):
        make_config(tokens=200)
    for every in (0, "0K", -1, 1.5, True, [1]):
        with pytest.raises(UserError, match=r"checkpoint\.every"):
            make_config(checkpoint={"every": every})


def test_a_cohort_of_one_run_twice_is_refused(make_config):
    for other in (make_config(eval={"max_documents": 3}), make_config(name="TINY")):
        with pytest.raises(UserError, match="the same run asked for in two ways"):
            run_cohort([make_config(), other])


def test_config_yaml_of_a_run_reads_back_as_the_same_run(make_config, tmp_path):
    config = make_config(optim={"eps": 1e-9, "lr": 1e-5, "warmup": "512"}, tokens="3K", name="1e3")
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load(RunConfig, path) == config
    assert run_id(load(RunConfig, path)) == run_id(config)
