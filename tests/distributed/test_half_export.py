"""A model in bfloat16 that two processes wrote together is the one that a single process writes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tutelage.run import run
from tutelage.run_directory import RunDirectory, run_id

STILL = {"lr": 1e-30}
"""So small that every weight stays what it was: runs on one and two processes then end with equal weights."""


def weights(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(directory.model / "model.safetensors")


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_round_what_they_trained(make_config, tmp_path):
    shared = {"parallel": {"shard": 2}, "output": str(tmp_path / "two")}
    configs = [
        make_config(name="still", export_dtype="bfloat16", optim=STILL, **shared),
        make_config(name="half", export_dtype="bfloat16", **shared),
        make_config(name="whole", **shared),
    ]
    files = []
    for config in configs:
        files.append(tmp_path / f"{config.name}.yaml")
        files[-1].write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "tutelage", "train", "--nproc", "2", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    still, half, whole = (RunDirectory(tmp_path / "two" / run_id(config)) for config in configs)

    alone = run(make_config(name="still", export_dtype="bfloat16", optim=STILL))
    assert alone.id == still.id
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (alone.model / file).read_bytes() == (still.model / file).read_bytes(), file

    rounded, trained = weights(half), weights(whole)
    assert rounded.keys() == trained.keys()
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in trained.items())
    assert any(not torch.equal(rounded[name], weight) for name, weight in weights(still).items())

    theirs = AutoModelForCausalLM.from_pretrained(half.model)
    assert theirs.dtype == torch.bfloat16
    tokens_BT = torch.arange(24).unsqueeze(0)
    exact = AutoModelForCausalLM.from_pretrained(whole.model)(tokens_BT).logits
    assert torch.allclose(theirs.float()(tokens_BT).logits, exact, atol=0.05)
