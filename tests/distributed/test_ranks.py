"""Two gloo processes train the same model as one, with the same alphas, and score it once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import polars as pl
import pytest
import torch
import yaml
from forked_ranks import free_port, said_by
from training import losses, rows, weights
from transformers import OPTConfig, OPTForCausalLM

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.models import hub
from tutelage.run import run
from tutelage.run_directory import RunDirectory
from tutelage.teachers.cache.cache_writer import write_cache

pytestmark = pytest.mark.slow


@pytest.fixture
def on_two_ranks(warm, tmp_path):
    """A function that trains a run on two processes that torchrun starts, or that only seem to be its own."""

    def train(config, launched=None):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        out, err = launched(file) if launched else as_two_ranks([warm / "tutelage", "train", str(file)])
        (directory,) = config.output.iterdir()
        assert [line.split()[0] for line in out.splitlines()][:2] == ["run", "model"]
        assert out.count("next ") == 1  # of two processes, one speaks
        assert err.count(f"{directory.name}: done") == 1
        return RunDirectory(directory)

    return train


def by_torchrun(file):
    """Train a run file on two processes that torchrun starts; what was printed, and said beside it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tutelage", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def as_two_ranks(command):
    """Run a command twice at once, with the variables that torchrun sets; what both printed and said."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [os.environ | group | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    said = said_by([command] * 2, ranks)
    return tuple("".join(texts) for texts in zip(*said, strict=True))


@pytest.fixture(params=["unigram", "cache"])
def teacher(request, store, tmp_path):
    """The unigram control, alive or as samples on disk."""
    live = {"kind": "unigram"}
    if request.param == "unigram":
        return live
    teach = {"store": str(store), "teacher": live, "context_length": 32, "output": str(tmp_path / "caches")}
    return {"kind": "cache", "path": str(write_cache(validate(TeachConfig, teach, "test")))}


def test_two_ranks_equal_one(make_config, on_two_ranks, tmp_path, teacher):
    alone = run(make_config(teacher=teacher, objective={"alpha": 0.4}))
    config = make_config(teacher=teacher, objective={"alpha": 0.4}, output=str(tmp_path / "two"))
    two = on_two_ranks(config, by_torchrun)
    assert two.id == alone.id
    for a, b in zip(rows(two), rows(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    theirs = weights(alone)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


def test_dropout_draws_other_masks_on_every_rank_and_the_same_ones_again(
    make_config, on_two_ranks, store, tmp_path
):
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=2,
                       max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.2)  # fmt: skip
    hub.save(OPTForCausalLM(config), tmp_path / "start", store)
    first, again = (
        on_two_ranks(make_config(model={"path": str(tmp_path / "start")}, output=str(tmp_path / folder)))
        for folder in ("first", "again")
    )
    files = [directory.model / "model.safetensors" for directory in (first, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


STEPS = 40
"""Enough for the entropies to spread, so that counts of one rank alone would move the gate differently."""


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [
        ({"alpha": {"policy": "gap_driven", "window": 3, "scale": 2.0}}, 1e-4),
        ({"alpha": {"policy": "prequential", "period": 4, "probe": 2}}, 1e-4),
        # A hard threshold: rounding decides about a token now and then, one of 256.
        ({"alpha": 0.5, "gate": {"kind": "student_entropy", "keep": 0.5}}, 4e-3),
    ],
    ids=["gap_driven", "prequential", "student_entropy"],
)
def test_two_ranks_choose_the_alphas_of_one(objective, tolerance, make_config, on_two_ranks, tmp_path):
    changes = {"tokens": STEPS * 256, "teacher": {"kind": "unigram"}, "objective": objective}
    one = rows(run(make_config(**changes)))
    two = rows(on_two_ranks(make_config(**changes, output=str(tmp_path / "two"))))
    assert len(two) == len(one) == STEPS
    memory = {key for row in one for key in row if key.startswith(("policy_", "gate_"))}
    assert memory
    for a, b in zip(two, one, strict=True):
        for key in {"loss", "alpha", *memory} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance)


def on_the_way(store):
    """Settings of a run that is scored after every fifth step."""
    return {
        "every": 5 * 256,
        "domains": [{"name": "speeches", "store": str(store), "role": "in_domain"}],
        "max_documents": 4,
        "max_tokens": 80,
    }


def test_two_ranks_score_once_and_stay_in_step(make_config, on_two_ranks, store, tmp_path):
    two = on_two_ranks(make_config(eval=on_the_way(store), output=str(tmp_path / "two")))
    alone = run(make_config(eval=on_the_way(store)))
    ours, theirs = (pl.read_ndjson(directory.scores) for directory in (two, alone))
    key = ["step", "domain", "split", "metric", "version", "n"]
    assert ours.select(key).equals(theirs.select(key))
    assert ours["step"].unique().sort().to_list() == [5, 10, 12]
    for metric in ("bits_per_byte", "brier", "ece"):
        a, b = (frame.filter(metric=metric)["value"].to_list() for frame in (ours, theirs))
        assert a == pytest.approx(b, rel=1e-2)
    found, expected = ([row["loss"] for row in losses(directory)] for directory in (two, alone))
    assert len(found) == 12
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_ranks_go_on_at_a_step_at_which_they_are_scored(make_config, on_two_ranks, store, tmp_path):
    """Scoring is their first pass then, and training could not use what FSDP had made in it."""
    saving = {"checkpoint": {"every": 5 * 256, "keep": 3}, "output": str(tmp_path / "two")}
    two = on_two_ranks(make_config(**saving))
    expected = weights(two)
    for left in (two.saved()[10], two.saved()[12], two.model):
        shutil.rmtree(left)
    (two.path / "state.json").unlink()
    two = on_two_ranks(make_config(eval=on_the_way(store), **saving))
    assert pl.read_ndjson(two.scores)["step"].unique().sort().to_list() == [5, 10, 12]
    torch.testing.assert_close(weights(two), expected, rtol=0, atol=0)
