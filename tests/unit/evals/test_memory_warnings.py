"""A model that may not fit into what is free: each way to evaluate it says so before it is loaded, once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import Notes
from transformers import GPT2Config, GPT2LMHeadModel

from tutelage.data.store import open_store
from tutelage.evals.evaluate import EvalRequest, evaluate
from tutelage.evals.evaluated_model import find_model
from tutelage.evals.lm_eval import run_downstream
from tutelage.evals.probes import run_probes
from tutelage.evals.recall import run_recall
from tutelage.evals.samples import Sampling, sample
from tutelage.evals.token_comparison import compare_tokens
from tutelage.models import hub
from tutelage.models.devices import Hardware

ROLES = ("student", "teacher", "baseline")


@pytest.fixture(scope="module")
def models(store, tmp_path_factory):
    """Directories of a family that the plan of memory does not know."""
    folder = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        sizes = {"vocab_size": open_store(store).vocab_size, "n_positions": 64, "n_embd": 16, "n_head": 2}
        hub.save(GPT2LMHeadModel(GPT2Config(**sizes, n_layer=1 + seed)), folder / role, store)
    return folder


def score(found, store, folder, notes):
    evaluate([str(found["student"].model)], EvalRequest({}, {"t": store}, folder, 1, 64, "cpu"), notes)


def tasks(found, store, folder, notes):
    asked, limits = [f"continuation:{store}"], {"limit": 2, "device": "cpu"}
    run_downstream(found["student"], asked, stores=folder / "stores", progress=notes, **limits)


def probe(found, store, folder, notes):
    run_probes(found["student"], store=store, teacher=found["teacher"], device="cpu", progress=notes)


def recall(found, store, folder, notes):
    run_recall(found["student"], folder / "stores", notes, store=store, device="cpu")


def samples(found, store, folder, notes):
    sample([found["student"]], ["The"], Sampling(tokens=2), "cpu", notes)


def tokens(found, store, folder, notes):
    limits = {"split": "test", "max_documents": 2, "max_tokens": 64, "device": "cpu"}
    compare_tokens(**found, store=open_store(store), output=folder, progress=notes, **limits)


@pytest.mark.parametrize(
    ("ask", "loaded"),
    [
        (score, ROLES[:1]),
        (tasks, ROLES[:1]),
        (probe, ROLES[:2]),
        (recall, ROLES[:1]),
        (samples, ROLES[:1]),
        (tokens, ROLES),
    ],
)
def test_each_model_is_warned_of_once(ask, loaded, models, store, tmp_path, monkeypatch):
    """Only `eval score` did it, and only of families that the plan knows."""
    here = Hardware.here("cpu", 1, 1)
    weights = {role: (models / role / "model.safetensors").stat().st_size for role in loaded}
    for free, warned in ((min(weights.values()), True), (2 * max(weights.values()), False)):
        monkeypatch.setattr(Hardware, "here", lambda *_, free=free, **__: replace(here, memory=free))
        folder, notes = tmp_path / str(free), Notes()
        found = {role: find_model(str(models / role), folder) for role in ROLES}
        ask(found, store, folder, notes)
        told = [text for text in notes.warnings if "it may need" in text]
        assert [text.split()[1] for text in told] == [f"{found[role].id}:" for role in loaded] * warned
        assert all("most during the loading of the model" in text for text in told)
