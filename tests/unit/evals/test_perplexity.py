from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tutelage.data.store import open_store
from tutelage.evals import perplexity
from tutelage.evals.perplexity import DocumentLosses, score_documents
from tutelage.models.hub import build
from tutelage.models.ladder import rung


@pytest.fixture(scope="module")
def model():
    return build(rung("nano-50k"), 300, 32, seed=1)


def plain(model, store, split, documents, max_tokens, context=32):
    """The same losses through transformers' own forward and torch's own cross-entropy, token by token."""
    opened = open_store(store)
    view = opened.split(split)
    result = []
    for index in range(documents):
        a, b = (int(x) for x in view.offsets[index : index + 2, 0])
        tokens = [opened.eos_id, *map(int, view.tokens[a : min(b - 1, a + max_tokens)])]
        total = 0.0
        for start in range(0, len(tokens) - 1, context):
            piece = torch.tensor(tokens[start : start + context + 1])
            logits = model(input_ids=piece[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
        result.append(total)
    return result


def test_losses_are_those_of_transformers(model, store):
    found = score_documents(model, open_store(store), "test", 32, max_documents=3, max_tokens=77)
    with torch.no_grad():
        np.testing.assert_allclose(found.nll_N, plain(model, store, "test", 3, 77), rtol=1e-5)
    assert list(found.tokens_N) == [77, 77, 77]


def test_batching_of_windows_does_not_matter(model, store, monkeypatch):
    arguments = (model, open_store(store), "validation", 32, 4, 100)
    whole = score_documents(*arguments)
    monkeypatch.setattr(perplexity, "_FORWARD_TOKENS", 32)
    monkeypatch.setattr(perplexity, "_LOGIT_TOKENS", 7)
    np.testing.assert_allclose(score_documents(*arguments).nll_N, whole.nll_N, rtol=1e-5)


def test_bytes_are_those_of_the_text(model, store):
    found = score_documents(model, open_store(store), "test", 32, max_documents=2, max_tokens=10**9)
    view = open_store(store).split("test")
    assert list(found.bytes_N) == list(np.diff(view.offsets[:3, 1].astype(np.int64)))


def test_bits_per_byte_and_its_standard_error_are_the_ratio_estimator():
    rng = np.random.default_rng(0)
    n, draws, true = 60, 400, 1.5
    estimates, errors = [], []
    for _ in range(draws):
        size = rng.integers(500, 1500, n)
        nll = size * true * math.log(2) + rng.normal(0, 60, n)
        losses = DocumentLosses(nll, size // 2, size)
        value, stderr = losses.bits_per_byte()
        estimates.append(value)
        errors.append(stderr)
    assert np.mean(estimates) == pytest.approx(true, abs=0.002)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.1)


def test_one_document_has_no_standard_error():
    value, stderr = DocumentLosses(np.array([math.log(2) * 8]), np.array([2]), np.array([8])).bits_per_byte()
    assert value == pytest.approx(1.0)
    assert math.isnan(stderr)
