"""A head with a bias (Phi, GPT-J), from the first step to the scores: the bias is never left out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from training import opened
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, PhiConfig, PhiForCausalLM

from tutelage.config.load import validate
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.store import open_store
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.token_quantities import Predictions
from tutelage.evals.token_scores import NextTokenModel, score_tokens
from tutelage.evals.windows import read_documents, window_batches
from tutelage.models import hub
from tutelage.objective.products import dense_logits
from tutelage.run import run
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.teachers.cache.reader import CachedTeacher, open_cache
from tutelage.train.step import loss_sums

FAMILIES = {
    "phi": (PhiForCausalLM, lambda v: PhiConfig(
        vocab_size=v, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0)),
    "gpt-j": (GPTJForCausalLM, lambda v: GPTJConfig(
        vocab_size=v, n_embd=32, n_layer=2, n_head=2, n_positions=128, rotary_dim=8, bos_token_id=0,
        eos_token_id=0)),
}  # fmt: skip


@pytest.fixture(params=[("phi", 300), ("phi", 320), ("gpt-j", 300)], ids=str)
def biased(request, store, tmp_path):
    """A model with a large bias; 320 has padded rows, whose bias would take half of the probability."""
    family, rows = request.param
    torch.manual_seed(0)
    make, config = FAMILIES[family]
    model = make(config(rows)).eval()
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.randn(rows))
        model.lm_head.bias[300:] = 6.0
    hub.save(model, tmp_path / "start", store)
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.flatten(0, 1)[:, :300]


def test_the_training_loss_is_the_models_own(biased, make_config, tmp_path):
    student = opened(make_config(model={"path": str(tmp_path / "start")}))
    batch = student.loader.batch(0)
    student.model.eval()
    sums = loss_sums(student, batch, None, 0.0)
    expected = F.cross_entropy(logits(biased, batch.tokens_BT), batch.labels_BT.flatten(), reduction="sum")
    torch.testing.assert_close(sums.loss.detach(), expected)
    without = F.cross_entropy(
        logits(biased, batch.tokens_BT) - biased.lm_head.bias[:300],
        batch.labels_BT.flatten(),
        reduction="sum",
    )
    assert abs(without - expected) > 0.05 * expected
    sums.loss.backward()
    probabilities = logits(biased, batch.tokens_BT).softmax(-1)
    gold = F.one_hot(batch.labels_BT.flatten(), 300)
    gradient = student.model.get_output_embeddings().bias.grad
    torch.testing.assert_close(gradient[:300], (probabilities - gold).sum(0), rtol=1e-4, atol=1e-4)
    assert not gradient[300:].any()


def test_as_a_teacher_live_and_from_caches(biased, make_config, tmp_path, store):
    teacher = {"kind": "model", "path": str(tmp_path / "start")}
    student = opened(make_config(teacher=teacher, objective={"alpha": 0.5}))
    batch = student.loader.batch(0)
    expected = logits(biased, batch.tokens_BT)
    with torch.no_grad():
        targets = student.teacher.targets(batch)
    torch.testing.assert_close(dense_logits(targets, slice(None), 300), expected)
    for kept in ({"kind": "hidden", "dtype": "float32"}, {"kind": "topk", "k": 9}):
        config = {
            "store": str(store),
            "teacher": teacher,
            "context_length": 32,
            "format": kept,
            "device": "cpu",
            "output": str(tmp_path / "caches"),
        }
        path = write_cache(validate(TeachConfig, config, "test"))
        found = CachedTeacher(open_cache(path), torch.device("cpu")).targets(batch)
        if kept["kind"] == "hidden":
            torch.testing.assert_close(dense_logits(found, slice(None), 300), expected)
            continue
        top = expected.softmax(-1).topk(9)
        assert torch.equal(found.ids_NK, top.indices)
        torch.testing.assert_close(found.probs_NK, top.values, rtol=1e-3, atol=1e-6)


def test_a_run_trains_exports_and_scores_the_bias(biased, make_config, tmp_path, store):
    domains = [{"name": "speeches", "store": str(store), "role": "in_domain"}]
    evaluation = {"domains": domains, "max_documents": 3, "max_tokens": 90}
    directory = run(make_config(model={"path": str(tmp_path / "start")}, optim={"lr": 1e-3}, eval=evaluation))
    weights = load_file(directory.model / "model.safetensors")
    moved = (weights["lm_head.bias"] - biased.lm_head.bias.detach()).abs()
    assert moved[:300].min() > 0
    assert not moved[300:].any()
    exported = AutoModelForCausalLM.from_pretrained(directory.model).eval()
    documents = read_documents(open_store(store), "test", 2, 60)
    found = score_tokens(hub.load(directory.model), documents, 300, context=60)
    expected = 0.0
    for batch in window_batches(documents, 60, 60):
        labels_N = batch.labels_BT.flatten()
        expected -= F.cross_entropy(logits(exported, batch.inputs_BT), labels_N, reduction="sum").item()
    assert found.logp_N.sum() == pytest.approx(expected, rel=1e-5)


def test_probes_and_token_comparison_use_it(biased, tmp_path, store):
    evaluated = find_model(str(tmp_path / "start"), tmp_path)
    model = NextTokenModel.of(hub.load(evaluated.model), open_store(store).vocab_size)
    tokens = torch.arange(40).view(1, 40)
    hidden = model.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))
    found = Predictions.of(model.logits(hidden)).logp_NV
    torch.testing.assert_close(found, logits(biased, tokens).log_softmax(-1))
