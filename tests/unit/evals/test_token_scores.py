"""Losses against transformers' own forward, and what they must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tutelage.data.store import open_store
from tutelage.evals import token_scores, windows
from tutelage.evals.token_scores import DocumentLosses, NextTokenModel, ratio, score_tokens
from tutelage.evals.windows import read_documents
from tutelage.models.hub import build
from tutelage.models.shapes import find_shape

CONTEXT = 32


@pytest.fixture(scope="module")
def model():
    built = build(find_shape("nano-50k"), 300, CONTEXT, seed=1)
    for weight in built.parameters():
        weight.data *= 2  # far from uniform
    return built.eval()


@pytest.fixture(scope="module")
def opened(store):
    return open_store(store)


@pytest.fixture(scope="module")
def documents(opened):
    return read_documents(opened, "test", 3, 77)


def plain_logits(model, tokens, first, stride=CONTEXT):
    """float64 logits, one row per prediction, of a window that scores the tokens from `first` on."""
    start = max(0, first - (CONTEXT - stride))
    end = min(len(tokens) - 1, CONTEXT if first == 0 else first + stride)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens[start:end]])).logits[0].double()
    return logits[first - start :], tokens[first + 1 : end + 1], end


def plain(model, document, stride=CONTEXT):
    """The same numbers through transformers' own forward and torch's own softmax, window by window."""
    tokens = document.tokens_N.tolist()
    rows, labels, first = [], [], 0
    while first < len(tokens) - 1:
        logits, wanted, first = plain_logits(model, tokens, first, stride)
        rows.append(logits)
        labels += wanted
    return torch.cat(rows), torch.tensor(labels)


@pytest.mark.parametrize("stride", [CONTEXT, 12])
def test_losses_are_those_of_transformers(model, opened, documents, stride):
    found = score_tokens(model, documents, 300, CONTEXT, stride).losses(documents)
    theirs = [
        torch.nn.functional.cross_entropy(*plain(model, document, stride), reduction="sum")
        for document in documents
    ]
    np.testing.assert_allclose(found.nll_N, np.array(theirs), rtol=1e-5)
    assert list(found.tokens_N) == [76, 76, 76]
    mean = float(sum(theirs)) / (3 * 76)
    assert found.perplexity().value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.bits_per_byte().value == pytest.approx(
        mean * 228 / math.log(2) / found.bytes_N.sum(), rel=1e-5
    )


def test_every_number_of_a_token_is_a_plain_recomputation(model, opened, documents):
    powers = (0.5, 2.0)
    found = score_tokens(model, documents, 300, CONTEXT, powers=powers, every=3)
    pieces = [plain(model, document) for document in documents]
    logits_NV, labels_N = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    p_NV = logits_NV.softmax(1)
    at = np.lexsort((found.logp_N, found.label_N, found.document_N))
    owner_N = np.repeat(np.arange(3), 76)
    gold_N = logits_NV.log_softmax(1).gather(1, labels_N[:, None])[:, 0].numpy()
    theirs = np.lexsort((gold_N, labels_N.numpy(), owner_N))
    assert len(at) == 228
    brier_N = ((p_NV - torch.nn.functional.one_hot(labels_N, 300)) ** 2).sum(1).numpy()
    for ours, plain_N in (
        (found.logp_N, gold_N),
        (found.confidence_N, p_NV.amax(1).numpy()),
        (found.correct_N, (logits_NV.argmax(1) == labels_N).numpy()),
        (found.brier_N, brier_N),
    ):
        np.testing.assert_allclose(ours[at], plain_N[theirs], rtol=2e-5, atol=2e-6)
    assert found.sampled_N.sum() == 3 * 25
    for k, power in enumerate(powers):
        at_power_N = (power * logits_NV).log_softmax(1).gather(1, labels_N[:, None])[:, 0].numpy()
        thirds = at_power_N[np.tile(np.arange(1, 77) % 3 == 0, 3)]
        np.testing.assert_allclose(np.sort(found.powered_MK[:, k]), np.sort(thirds), rtol=2e-5, atol=2e-6)


def test_batching_of_windows_and_logits_does_not_matter(model, opened, documents, monkeypatch):
    whole = score_tokens(model, documents, 300, CONTEXT).losses(documents)
    monkeypatch.setattr(windows, "FORWARD_TOKENS", CONTEXT)
    monkeypatch.setattr(token_scores, "_LOGITS", 1)
    monkeypatch.setattr(token_scores, "_FEWEST_ROWS", 7)
    parts = score_tokens(model, documents, 300, CONTEXT).losses(documents)
    np.testing.assert_allclose(parts.nll_N, whole.nll_N, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_weights_are_not_rounded_to_it(dtype):
    half = build(find_shape("nano-50k"), 300, CONTEXT, seed=1).to(dtype)
    hidden_ND = torch.randn(64, half.config.hidden_size, dtype=dtype)
    truth_NV = hidden_ND.double() @ half.lm_head.weight.double().T
    logits_NV = NextTokenModel.of(half, 300).logits(hidden_ND)
    assert logits_NV.dtype == torch.float32
    assert (logits_NV - truth_NV).abs().max() < 1e-6 * truth_NV.abs().max()


@pytest.mark.parametrize("tokens", [77, 2000])
def test_logits_of_a_bounded_number_of_tokens_exist(model, opened, tokens, monkeypatch):
    """Whatever the length of the text: memory does not grow with tokens times vocabulary."""
    monkeypatch.setattr(token_scores, "_LOGITS", 300 * 64)
    monkeypatch.setattr(token_scores, "_FEWEST_ROWS", 16)
    shapes = []
    measured = token_scores._measured

    def noted(logits_NV, *rest):
        shapes.append(tuple(logits_NV.shape))
        return measured(logits_NV, *rest)

    monkeypatch.setattr(token_scores, "_measured", noted)
    documents = read_documents(opened, "test", 3, tokens)
    score_tokens(model, documents, 300, CONTEXT)
    assert sum(rows for rows, _ in shapes) == sum(document.scored for document in documents)
    assert max(rows for rows, _ in shapes) == 64
    assert {width for _, width in shapes} == {300}


def test_a_permutation_of_the_documents_leaves_every_score_unchanged(model, opened):
    documents = read_documents(opened, "validation", 12, 60)
    shuffled = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    ours, theirs = (score_tokens(model, order, 300, CONTEXT).losses(order) for order in (documents, shuffled))
    for ahead, back in zip(
        (ours.bits_per_byte(), ours.perplexity()), (theirs.bits_per_byte(), theirs.perplexity()), strict=True
    ):
        assert (ahead.value, ahead.stderr) == pytest.approx((back.value, back.stderr), rel=1e-6)
        assert (ahead.low, ahead.high) == pytest.approx((back.low, back.high), rel=1e-6)


def test_no_window_is_longer_than_the_context_and_every_token_is_scored_once(opened):
    documents = read_documents(opened, "test", 3, 100)
    for stride in (1, 7, CONTEXT):
        seen = set()
        for batch in windows.window_batches(documents, CONTEXT, stride):
            assert batch.inputs_BT.shape[1] <= CONTEXT
            for row, column in (batch.labels_BT != -100).nonzero().tolist():
                place = (int(batch.documents_BT[row, column]), int(batch.places_BT[row, column]))
                assert place not in seen
                seen.add(place)
                assert batch.labels_BT[row, column] == documents[place[0]].tokens_N[place[1]]
        assert len(seen) == sum(len(document.tokens_N) - 1 for document in documents)
        assert not any(place == 0 for _, place in seen)


def test_losses_of_windows_add_up_and_tell_the_first_from_the_others(model, opened):
    documents = [*read_documents(opened, "test", 2, 77), *read_documents(opened, "test", 3, 20)[2:]]
    tokens = score_tokens(model, documents, 300, CONTEXT)
    found, whole = tokens.windows(documents), tokens.losses(documents)
    assert list(zip(found.document_W, found.window_W, strict=True)) == [
        *((document, window) for document in (0, 1) for window in (0, 1, 2)),
        (2, 0),
    ]
    assert found.tokens_W.tolist() == [32, 32, 12, 32, 32, 12, 19]
    for column_W, total_N in ((found.nll_W, whole.nll_N), (found.bytes_W, whole.bytes_N)):
        np.testing.assert_allclose(np.bincount(found.document_W, column_W), total_N)
    first, rest = [], []
    for document in documents[:2]:
        rows, labels = plain(model, document)
        losses = torch.nn.functional.cross_entropy(rows, labels, reduction="none")
        first.append(losses[:CONTEXT])
        rest.append(losses[CONTEXT:])
    excess, several = found.first_excess(len(documents))
    assert several == 2  # the short document has no other window
    assert excess.value == pytest.approx(float(torch.cat(first).mean() - torch.cat(rest).mean()), abs=1e-5)
    assert excess.stderr > 0


def test_bits_per_byte_and_its_standard_error_are_the_ratio_estimator():
    rng = np.random.default_rng(0)
    n, draws, true = 60, 200, 1.5
    estimates, errors = [], []
    for _ in range(draws):
        size = rng.integers(500, 1500, n)
        nll = size * true * math.log(2) + rng.normal(0, 60, n)
        found = DocumentLosses(nll, size // 2, size).bits_per_byte()
        estimates.append(found.value)
        errors.append(found.stderr)
    assert np.mean(estimates) == pytest.approx(true, abs=0.003)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_one_document_has_no_standard_error():
    found = ratio(np.array([8.0]), np.array([8]))
    assert found.value == pytest.approx(1.0)
    assert math.isnan(found.stderr)
    assert (found.low, found.high) == (None, None)


def test_the_perplexity_of_any_loss_is_a_number():
    """A run that diverged without a NaN loses thousands of nats per token."""
    for nats in (3.0, 690.0, 5000.0):
        found = DocumentLosses(nats * np.array([4.0, 8.0, 3.0]), np.array([4, 8, 3]), np.array([9, 9, 9]))
        perplexity = found.perplexity()
        assert math.log(perplexity.value) == pytest.approx(min(nats, 700.0))
        assert all(map(math.isfinite, (perplexity.stderr, perplexity.low, perplexity.high)))
        assert found.bits_per_byte().value == pytest.approx(nats * 15 / 27 / math.log(2))
