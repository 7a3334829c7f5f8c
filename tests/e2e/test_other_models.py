"""Models that are no runs of ours, by directory and by Hub name: ids that mean something else are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from tutelage.config.data_config import StoreConfig, TokenizerConfig
from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.data.store import open_store
from tutelage.errors import UserError
from tutelage.evals.evaluate import EvalRequest, evaluate
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.probes import run_probes
from tutelage.evals.token_comparison import compare_tokens
from tutelage.models import hub, shapes
from tutelage.models.directory import weights_fingerprint
from tutelage.progress import NullProgress
from tutelage.run import run, run_cohort
from tutelage.run_directory import run_id
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.layout import read_cache_manifest

COMMIT = "b" * 40
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def directory(store, tmp_path):
    """A model as others publish them: without our checksums, which would notice what the tests change."""
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 32, seed=9), tmp_path / "model", store)
    (tmp_path / "model" / "checksums.json").unlink()
    return tmp_path / "model"


def permuted(directory):
    """The same strings under other ids: as many of them, each in the wrong place but the end of text."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate([words[0], *words[:0:-1]])}
    path.write_text(json.dumps(tokenizer))


def without_tokenizer(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def on_the_hub(directory, home, commit=COMMIT):
    """Put a directory where the Hub's cache would hold the repository some/model, as its newest commit."""
    repository = home / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(directory, repository / "snapshots" / commit)


def command(arguments, home, cwd):
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


ROLES = {
    "teacher": {"teacher": {"kind": "model", "path": "some/model"}, "objective": {"alpha": 0.4}},
    "student": {"model": {"path": "some/model"}, "optim": {"lr": 1e-3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_hub_name_is_compared_too(role, directory, make_config, tmp_path):
    file = tmp_path / "run.yaml"
    changes = ROLES[role]
    file.write_text(yaml.safe_dump(make_config(**changes).model_dump(mode="json")))
    on_the_hub(directory, tmp_path / "right")
    code, words = command(["train", str(file)], tmp_path / "right", tmp_path)
    assert code == 0, words
    permuted(directory)
    on_the_hub(directory, tmp_path / "wrong")
    code, words = command(["train", str(file), "seed=5"], tmp_path / "wrong", tmp_path)
    assert code == 2
    assert "some/model: its tokenizer differs from that of" in words
    assert "id 1 is " in words
    without_tokenizer(directory)
    on_the_hub(directory, tmp_path / "none")
    code, words = command(["train", str(file), "seed=5"], tmp_path / "none", tmp_path)
    assert code == 2
    setting = f"{'model' if role == 'student' else 'teacher'}.assume_same_tokenizer"
    assert f"set {setting}: true if you know it" in words
    code, words = command(["train", str(file), "seed=5", f"{setting}=true"], tmp_path / "none", tmp_path)
    assert code == 0, words
    assert "its ids are assumed to be those of" in words


def runs_of(config):
    return {
        path.name: yaml.safe_load((path / "config.yaml").read_text())
        for path in config.output.iterdir()
        if (path / "model").is_dir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_another_commit_of_a_hub_name_is_another_run(role, directory, store, make_config, tmp_path):
    config = make_config(**ROLES[role])
    file, home = tmp_path / "run.yaml", tmp_path / "home"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    on_the_hub(directory, home)
    assert command(["train", str(file)], home, tmp_path)[0] == 0
    (first,) = runs_of(config)
    on_the_hub_again, newer = tmp_path / "newer", "c" * 40
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 32, seed=10), on_the_hub_again, store)
    on_the_hub(on_the_hub_again, home, newer)
    assert command(["train", str(file)], home, tmp_path)[0] == 0
    (second,) = runs_of(config).keys() - {first}
    section = "model" if role == "student" else "teacher"
    commits = {name: saved[section]["revision"] for name, saved in runs_of(config).items()}
    assert commits == {first: COMMIT, second: newer}
    weights = [weights_fingerprint(config.output / name / "model") for name in commits]
    assert weights[0] != weights[1]
    by_hand = [str(config.output / first / "config.yaml"), f"{section}.revision={COMMIT}"]
    code, words = command(["train", *by_hand], home, tmp_path)
    assert code == 0, words
    assert "is finished; nothing to do" in words
    assert f"some/model at {newer}" in (config.output / second / "model" / "README.md").read_text()


@pytest.mark.slow
def test_teach_compares_a_hub_name_too(directory, store, tmp_path):
    file = tmp_path / "cache.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "store": str(store),
                "teacher": {"kind": "model", "path": "some/model"},
                "context_length": 32,
                "output": str(tmp_path / "caches"),
            }
        )
    )
    permuted(directory)
    on_the_hub(directory, tmp_path / "wrong")
    code, words = command(["teach", str(file)], tmp_path / "wrong", tmp_path)
    assert code == 2
    assert "teacher some/model: its tokenizer differs from that of" in words


def test_an_assumption_is_written_down_wherever_it_is_made(directory, make_config, store, tmp_path):
    without_tokenizer(directory)
    taught = {"kind": "model", "path": str(directory)}
    with pytest.raises(UserError, match=r"teacher .*: it has no tokenizer"):
        run(make_config(teacher=taught, objective={"alpha": 0.4}))
    assumed = taught | {"assume_same_tokenizer": True}
    done = run(make_config(teacher=assumed, objective={"alpha": 0.4}))
    (note,) = json.loads((done.path / "provenance.json").read_text())["notes"]
    assert "its ids are assumed to be those of" in note
    assert note in (done.model / "README.md").read_text()
    teach = {
        "store": str(store),
        "teacher": assumed,
        "context_length": 32,
        "output": str(tmp_path / "caches"),
    }
    cache = write_cache(validate(TeachConfig, teach, "test"))
    manifest = read_cache_manifest(cache)
    assert manifest.teacher.notes == (note,)
    eager = write_cache(
        validate(TeachConfig, teach | {"teacher": assumed | {"attn_implementation": "eager"}}, "test")
    )
    assert eager != cache
    assert read_cache_manifest(eager).fingerprint != manifest.fingerprint
    student = run(
        make_config(teacher={"kind": "cache", "path": str(cache)}, objective={"alpha": 0.4}, name="cached")
    )
    assert json.loads((student.path / "provenance.json").read_text())["notes"] == [note]


def test_the_assumption_does_not_change_a_runs_name(directory, make_config):
    taught = {"kind": "model", "path": str(directory)}
    plain = make_config(teacher=taught, objective={"alpha": 0.4})
    assumed = make_config(teacher=taught | {"assume_same_tokenizer": True}, objective={"alpha": 0.4})
    eager = make_config(teacher=taught | {"attn_implementation": "eager"}, objective={"alpha": 0.4})
    assert run_id(plain) == run_id(assumed) != run_id(eager)


def test_where_a_teachers_weights_lie_is_no_part_of_a_runs_name_but_their_dtype_is(directory, make_config):
    plain, placed, rounded = (
        run_id(
            make_config(teacher={"kind": "model", "path": str(directory)} | changes, objective={"alpha": 0.4})
        )
        for changes in ({}, {"placement": "replicate", "reshard_after_forward": False}, {"dtype": "bfloat16"})
    )
    assert plain == placed != rounded


@pytest.fixture
def short_sighted(store, tmp_path):
    """A GPT-2 of 16 positions."""
    torch.manual_seed(0)
    hub.save(GPT2LMHeadModel(GPT2Config(**GPT2, n_positions=16)), tmp_path / "gpt2", store)
    return str(tmp_path / "gpt2")


def test_positions_that_are_not_there_are_refused_before_the_first_step(
    short_sighted, make_config, store, tmp_path
):
    message = r"gpt2: it has 16 positions, and sequences of 32 tokens are asked for"
    teacher = {"teacher": {"kind": "model", "path": short_sighted}, "objective": {"alpha": 0.4}}
    student = {"model": {"path": short_sighted}, "optim": {"lr": 1e-3}}
    cached = {"kind": "model", "path": short_sighted, "cache": {"format": {"kind": "hidden"}}}
    for changes in (teacher, student, teacher | {"teacher": cached}):
        with pytest.raises(UserError, match=message):
            run(make_config(**changes))
    with pytest.raises(UserError, match=message):
        run_cohort([make_config(), make_config(name="taught", **teacher)])
    teach = {
        "store": str(store),
        "teacher": teacher["teacher"],
        "context_length": 32,
        "output": str(tmp_path),
    }
    with pytest.raises(UserError, match=message):
        write_cache(validate(TeachConfig, teach, "test"))
    fits = run(make_config(**student, data={"store": str(store), "sequence_length": 16}))
    assert fits.is_done()


def test_every_evaluation_stays_within_a_models_positions(short_sighted, store, other_store, tmp_path):
    evaluated = find_model(short_sighted, tmp_path / "evals")
    assert evaluated.context == 16
    request = EvalRequest({}, {"scripture": other_store}, tmp_path / "evals", 2, 60, "cpu")
    rows, _ = evaluate([short_sighted], request, NullProgress())
    assert rows
    assert run_probes(evaluated, store=store)
    found = compare_tokens(
        student=evaluated,
        teacher=evaluated,
        baseline=evaluated,
        store=open_store(store),
        split="test",
        max_documents=2,
        max_tokens=60,
        device="cpu",
        output=tmp_path / "evals",
        progress=NullProgress(),
    )
    assert found.is_dir()


def test_a_rotary_teacher_beyond_its_length_is_a_note(directory, make_config, store):
    taught = {"teacher": {"kind": "model", "path": str(directory)}, "objective": {"alpha": 0.4}}
    done = run(make_config(**taught, data={"store": str(store), "sequence_length": 64}))
    (note,) = json.loads((done.path / "provenance.json").read_text())["notes"]
    assert "it was made for sequences of 32 tokens and reads 64 here" in note


def test_a_family_without_attention_teaches_learns_and_is_scored(store, other_store, make_config, tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, bos_token_id=0, eos_token_id=0,
                         pad_token_id=None)  # fmt: skip
    hub.save(MambaForCausalLM(config), tmp_path / "mamba", store)
    path = str(tmp_path / "mamba")
    taught = {"teacher": {"kind": "model", "path": path}, "objective": {"alpha": 0.4}, "tokens": 2 * 256}
    assert run(make_config(**taught)).is_done()
    student = run(make_config(model={"path": path}, optim={"lr": 1e-3}, tokens=2 * 256))
    assert student.state()["export"]["largest_logit_difference"] < 1e-6
    request = EvalRequest({}, {"scripture": other_store}, tmp_path / "evals", 1, 40, "cpu")
    rows, _ = evaluate([path], request, NullProgress())
    assert {row.run.split("-")[0] for row in rows} == {"mamba"}


def test_a_tokenizer_of_more_ids_than_rows_is_refused(store, make_config, tmp_path):
    tokenizer = json.loads((store / "tokenizer.json").read_text())
    hub.save(hub.build(shapes.find_shape("nano-50k"), 300, 32, seed=9), tmp_path / "model", store)
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=300, content="<|more|>"))
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "model" / "checksums.json").unlink()
    taught = {"teacher": {"kind": "model", "path": str(tmp_path / "model")}, "objective": {"alpha": 0.4}}
    for changes in (taught, {"model": {"path": str(tmp_path / "model")}, "optim": {"lr": 1e-3}}):
        with pytest.raises(UserError, match="its tokenizer has 301 ids, the model knows 300"):
            run(make_config(**changes))


def test_a_superset_of_the_vocabulary_is_fine(store, make_config, tmp_path):
    tokenizer = json.loads((store / "tokenizer.json").read_text())
    hub.save(hub.build(shapes.find_shape("nano-50k"), 310, 32, seed=9), tmp_path / "model", store)
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=300, content="<|more|>"))
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "model" / "checksums.json").unlink()
    taught = {"teacher": {"kind": "model", "path": str(tmp_path / "model")}, "objective": {"alpha": 0.4}}
    done = run(make_config(**taught))
    assert json.loads((done.path / "provenance.json").read_text())["notes"] == []


def test_an_evaluation_domain_of_other_ids_is_refused(store, make_config, tmp_path):
    config = StoreConfig(
        name="other",
        sources=({"kind": "corpus", "name": "kjv"},),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation=0.3,
        test=0.3,
        max_bytes=50_000,
    )
    other = build_store(config, tmp_path)
    with pytest.raises(UserError, match=r"eval domain kjv: .*tokenizer differs .*: id \d+ is"):
        run(make_config(eval={"domains": [{"name": "kjv", "store": str(other)}]}))
