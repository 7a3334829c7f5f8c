"""What can be evaluated, and what is said of what cannot."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers

from tutelage.data.store import open_store
from tutelage.errors import Stopped, UserError
from tutelage.evals.domains import SUITES
from tutelage.evals.evaluated_model import check_tokenizer, find_model, find_models
from tutelage.models import hub
from tutelage.models.shapes import LADDER
from tutelage.progress import NullProgress
from tutelage.run import run


@pytest.fixture
def directory(store, tmp_path):
    model = hub.build(LADDER["nano-50k"], open_store(store).vocab_size, 48, seed=0)
    hub.save(model, tmp_path / "models" / "tiny", store)
    (tmp_path / "models" / "tiny" / "checksums.json").unlink()  # tests change it on purpose
    return tmp_path / "models" / "tiny"


def test_a_run_is_scored_where_it_lies(tiny_run, store):
    finished = tiny_run
    evaluated = find_model(str(finished.path), finished.path / "elsewhere")
    assert (evaluated.id, evaluated.step, evaluated.tokens, evaluated.context) == (
        finished.id,
        12,
        12 * 256,
        32,
    )
    assert evaluated.output == finished.path
    assert evaluated.training_store == store


def test_a_model_directory_is_named_by_its_weights(directory, tmp_path):
    evaluated = find_model(str(directory), tmp_path / "out")
    assert evaluated.id.startswith("tiny-")
    assert (evaluated.step, evaluated.tokens, evaluated.context) == (0, 0, 48)
    assert evaluated.output == tmp_path / "out" / evaluated.id
    assert not evaluated.output.exists()
    moved = shutil.copytree(directory, tmp_path / "copy" / "tiny")
    assert find_model(str(moved), tmp_path).id == evaluated.id


def test_an_unfinished_run_says_how_far_it_is(make_config):
    class Stop(NullProgress):
        def advance(self, stage, step):
            if step == 5:
                raise Stopped

    config = make_config()
    with pytest.raises(Stopped):
        run(config, Stop())
    (path,) = config.output.iterdir()
    with pytest.raises(UserError, match=r"has not finished training \(stopped, step 4 of 12\)"):
        find_model(str(path), path)


def break_weights(directory):
    (directory / "model.safetensors").unlink()


def break_config(directory):
    (directory / "config.json").write_text("{}", encoding="utf-8")


def break_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def shrink_vocabulary(directory):
    model = hub.build(LADDER["nano-50k"], 200, 48, seed=0)
    model.save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "models/tiny"),
        (break_config, "no model that transformers knows"),
        (break_tokenizer, "tokenizer"),
        (
            shrink_vocabulary,
            "its tokenizer has 300 ids, the model knows 200; the tokenizer belongs to another",
        ),
    ],
)
def test_a_directory_that_is_no_model_is_refused(directory, tmp_path, damage, message):
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        check_tokenizer(find_model(str(directory), tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "no where", "a/b/c"])
def test_a_path_that_is_not_there_is_said(name, tmp_path):
    with pytest.raises(UserError, match="no such directory or run; give a run, a model directory or a Hub"):
        find_model(name, tmp_path)


def test_a_family_without_positions_reads_the_context_of_the_suites(directory, tmp_path):
    config = transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2).to_dict()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_model(str(directory), tmp_path).context == SUITES.context


def test_runs_of_one_name_in_two_places_are_refused_and_the_same_run_is_one(tiny_run, tmp_path):
    first = tiny_run.path
    assert len(find_models([str(first), f"{first}/"], tmp_path)) == 1
    second = shutil.copytree(first, tmp_path / "elsewhere" / first.name)
    with pytest.raises(UserError, match=f"both are called {first.name}"):
        find_models([str(first), str(second)], tmp_path)


def test_a_run_of_another_version_is_named_in_one_line(tiny_run, command):
    config = tiny_run.path / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("  shape: ", "  rung: ")
    config.write_text(text.replace("keep_before_decay: false", "trunk: 1"), encoding="utf-8")
    (tiny_run.path / "checksums.json").unlink()
    code, _, complaint = command("eval", "score", str(tiny_run.path), "--domain", "phenotypes")
    assert code == 2
    assert complaint == (
        f"error: {config}: written by another version of tutelage (this one does not read its model.rung, "
        f"checkpoint.trunk); train the run again, or use its model by itself, {tiny_run.model}\n"
    )
