"""Students exported in bfloat16: weights are rounded once; transformers and every command read them."""

from __future__ import annotations

import json

import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tutelage.evals.evaluate import EvalRequest, evaluate
from tutelage.models import hub
from tutelage.progress import NullProgress
from tutelage.run import run
from tutelage.run_directory import recipe, run_id
from tutelage.train.save_model import whole_model


def test_a_run_exports_what_it_trained_rounded_once(make_config, store, other_store, tmp_path):
    plain, half = run(make_config()), run(make_config(export_dtype="bfloat16"))
    trained, written = (load_file(done.model / "model.safetensors") for done in (plain, half))
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert trained.keys() == written.keys()
    assert all(torch.equal(weight.bfloat16(), written[name]) for name, weight in trained.items())
    assert all(written[name].dtype == torch.bfloat16 for name in written)
    assert half.state()["export"] == {"largest_logit_difference": 0.0}
    assert json.loads((half.model / "config.json").read_text())["dtype"] == "bfloat16"
    assert "| weights | bfloat16, trained as float32 |" in (half.model / "README.md").read_text()

    theirs = AutoModelForCausalLM.from_pretrained(half.model)
    assert theirs.dtype == torch.bfloat16
    tokens_BT = torch.arange(24).unsqueeze(0)
    exact = AutoModelForCausalLM.from_pretrained(plain.model)(tokens_BT).logits
    assert torch.allclose(theirs.float()(tokens_BT).logits, exact, atol=0.05)

    request = EvalRequest({}, {"scripture": other_store}, tmp_path / "evals", 4, 60, "cpu")
    rows, _ = evaluate([str(plain.path), str(half.path)], request, NullProgress())
    bits = {row.run: row.value for row in rows if row.metric == "bits_per_byte" and row.split == "test"}
    assert bits[half.id] == pytest.approx(bits[plain.id], rel=0.01)

    taught = {"teacher": {"kind": "run", "run": half.id}, "objective": {"alpha": 0.4}}
    assert run(make_config(name="taught", **taught)).is_done()
    assert run(make_config(name="more", model={"run": half.id}, optim={"lr": 1e-3})).is_done()


def test_the_dtype_is_part_of_a_runs_name_unless_it_is_float32(make_config):
    plain, half = make_config(), make_config(export_dtype="bfloat16")
    assert run_id(plain) != run_id(half)
    assert "export_dtype" not in recipe(plain)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v3", "mamba", "gpt_oss"])
def test_families_that_keep_some_weights_in_float32_can_be_read_back(family, store, tmp_path):
    model = tiny_families.tiny_model(family, tmp_path / "float32")
    half = whole_model(model, keep=True, dtype=torch.bfloat16).eval()
    assert hub.save(half, tmp_path / "half", store) == 0
    again = hub.load(tmp_path / "half").state_dict()
    kept = {name for name, weight in again.items() if weight.dtype == torch.float32}
    assert len(kept) < len(again) / 2
    for name, weight in model.state_dict().items():
        assert torch.equal(again[name], weight.to(again[name].dtype))
