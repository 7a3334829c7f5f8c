"""Two gloo processes train the same model as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.models import hub
from tutelage.run import run
from tutelage.teachers.cache.cache_writer import write_cache


@pytest.fixture(params=["unigram", "cache"])
def teacher(request, store, tmp_path):
    """The unigram control, alive or as samples on disk."""
    live = {"kind": "unigram"}
    if request.param == "unigram":
        return live
    teach = {"store": str(store), "teacher": live, "context_length": 32, "output": str(tmp_path / "caches")}
    return {"kind": "cache", "path": str(write_cache(validate(TeachConfig, teach, "test")))}


def on_two_ranks(file):
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tutelage", "train", str(file)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.slow
def test_two_ranks_equal_one(make_config, tmp_path, teacher):
    alone = run(make_config(teacher=teacher, objective={"alpha": 0.4}))
    config = make_config(teacher=teacher, objective={"alpha": 0.4}, output=str(tmp_path / "two"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = on_two_ranks(file)
    assert done.returncode == 0, done.stdout + done.stderr
    (two,) = Path(tmp_path / "two").iterdir()
    assert two.name == alone.id
    log = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (alone.path / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == len(reference)
    for a, b in zip(log, reference, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (two, alone.path))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_dropout_draws_other_masks_on_every_rank_and_the_same_ones_again(make_config, store, tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=2,
                       max_position_embeddings=32, word_embed_proj_dim=32, layerdrop=0.5)  # fmt: skip
    hub.save(OPTForCausalLM(config), tmp_path / "start", store)
    weights = []
    for folder in ("first", "again"):
        run_config = make_config(model={"path": str(tmp_path / "start")}, output=str(tmp_path / folder))
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run_config.model_dump(mode="json")))
        done = on_two_ranks(file)
        assert done.returncode == 0, done.stdout + done.stderr
        (two,) = Path(tmp_path / folder).iterdir()
        weights.append((two / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
