"""Models that cannot be used, wherever a model can stand: one line, before anything is computed."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tutelage.data.store import open_store
from tutelage.models import hub
from tutelage.models.shapes import find_shape


def quantized(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))


def packed(folder):
    """As GPTQ wrote models at first: integers under names of its own, and nothing in config.json."""
    weights = load_file(folder / "model.safetensors")
    weight = weights.pop("model.layers.0.mlp.up_proj.weight")
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0]).int()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KINDS = {
    quantized: "quantization_config.quant_method = 'gptq': quantized weights cannot be used here",
    packed: "1 weight is missing, for example model.layers.0.mlp.up_proj.weight",
    not_a_number: "model.layers.1.mlp.up_proj.weight holds numbers that are not finite (NaN or infinity)",
}


@pytest.mark.parametrize("spoil", KINDS, ids=lambda spoil: spoil.__name__)
def test_a_model_that_cannot_be_used_is_one_line_wherever_it_stands(
    spoil, store, make_config, command, tmp_path
):
    model = hub.build(find_shape("nano-50k"), open_store(store).vocab_size, 96, seed=0)
    hub.save(model, tmp_path / "model", store)
    (tmp_path / "model" / "checksums.json").unlink()
    spoil(tmp_path / "model")
    base = make_config().model_dump(mode="json", exclude_unset=True)
    taught = {"teacher": {"kind": "model", "path": "model"}, "objective": {"alpha": 0.4}}
    files = {
        "taught.yaml": base | taught,
        "student.yaml": base | {"model": {"path": "model"}, "optim": {"lr": 1e-3}},
        "cache.yaml": {"store": str(store), "teacher": taught["teacher"], "context_length": 32},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    task = f"continuation:{store}"
    for arguments in (
        ("train", "taught.yaml"),
        ("train", "student.yaml"),
        ("teach", "cache.yaml"),
        ("eval", "score", "model", "--store", f"own={store}", "--device", "cpu"),
        ("eval", "tasks", "model", "--task", task, "--limit", "4", "--device", "cpu"),
        ("eval", "probe", "model", "--store", store, "--device", "cpu"),
        ("eval", "tokens", "model", "--teacher", "model", "--baseline", "model", "--store", f"own={store}"),
    ):
        code, _, complaint = command(*arguments)
        assert (code, "Traceback" in complaint) == (2, False), arguments
        assert KINDS[spoil] in " ".join(complaint.split()), arguments
        assert "MISSING" not in complaint, arguments  # the table of transformers
        assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir()), arguments
