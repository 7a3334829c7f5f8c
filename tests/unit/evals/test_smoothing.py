"""The fits recover what was put in, and take a smoothed model's advantage away."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.evals.smoothing import POWERS, fit, frequencies, own_unigram

V, N = 40, 6000


@pytest.fixture(scope="module")
def world():
    """Logits of a model, a unigram of the vocabulary, and a generator."""
    rng = np.random.default_rng(0)
    logits_NV = rng.normal(0, 2.0, (N, V))
    unigram_V = frequencies(rng.integers(1, 2000, V))
    return rng, logits_NV, unigram_V


def log_softmax(logits_NV):
    shifted = logits_NV - logits_NV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def drawn(rng, p_NV):
    return (p_NV.cumsum(1) > rng.random((len(p_NV), 1))).argmax(1)


def at_powers(logits_NV, labels_N, powers=POWERS):
    rows = np.arange(len(labels_N))
    return np.stack([log_softmax(power * logits_NV)[rows, labels_N] for power in powers], 1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7, 3.0])
def test_a_known_temperature_is_found(world, temperature):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, np.exp(log_softmax(logits_NV / temperature)))
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], "test")
    assert found.temperature == pytest.approx(temperature, rel=0.06)
    assert found.weight < 0.06
    assert (found.unigram, found.tokens) == ("test", N)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.3), (1.5, 0.5), (1.0, 0.0)])
def test_a_known_mixture_is_found(world, temperature, weight):
    rng, logits_NV, unigram_V = world
    p_NV = (1 - weight) * np.exp(log_softmax(logits_NV / temperature)) + weight * unigram_V
    labels_N = drawn(rng, p_NV)
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], "test")
    assert found.weight == pytest.approx(weight, abs=0.05)
    assert found.mixed_temperature == pytest.approx(temperature, rel=0.15)


def test_the_fit_is_the_best_of_a_fine_grid(world):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, 0.7 * np.exp(log_softmax(logits_NV / 2)) + 0.3 * unigram_V)
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], "test")
    alone_N, mixed_N = found.apply(at_powers(logits_NV, labels_N, found.powers), unigram_V[labels_N])
    grid = np.geomspace(0.2, 3.0, 60)
    table_NK = at_powers(logits_NV, labels_N, grid)
    assert -alone_N.mean() <= -table_NK.mean(0).max() + 1e-4
    weights = np.linspace(0, 1, 51)
    losses = [
        -np.log((1 - w) * np.exp(table_NK) + w * unigram_V[labels_N][:, None]).mean(0).min() for w in weights
    ]
    assert -mixed_N.mean() <= min(losses) + 1e-4
    assert -mixed_N.mean() <= -alone_N.mean() + 1e-4


def test_the_advantage_of_a_model_that_only_hedges_vanishes(world):
    """Foreign text, on which the sharp model is over-confident; the other is the same model, smoothed."""
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, 0.6 * np.exp(log_softmax(0.5 * logits_NV)) + 0.4 * unigram_V)
    hedged_NV = np.log(0.7 * np.exp(log_softmax(logits_NV)) + 0.3 * unigram_V)
    halves = slice(0, N // 2), slice(N // 2, N)
    raw, repaired = {}, {}
    for name, logits in (("sharp", logits_NV), ("hedged", hedged_NV)):
        validation, test = halves
        fitted = fit(at_powers(logits[validation], labels_N[validation]), unigram_V[labels_N[validation]], "")
        powered = at_powers(logits[test], labels_N[test], fitted.powers)
        raw[name] = -at_powers(logits[test], labels_N[test], [1.0]).mean()
        repaired[name] = -fitted.apply(powered, unigram_V[labels_N[test]])[1].mean()
    assert raw["sharp"] - raw["hedged"] > 0.2
    assert abs(repaired["sharp"] - repaired["hedged"]) < 0.05 * (raw["sharp"] - raw["hedged"])


def test_weights_at_the_ends():
    labels_N = np.zeros(50, np.int64)
    sure = np.full((50, len(POWERS)), -1e-9)
    assert fit(sure, np.full(50, 0.01), "").weight == 0.0
    hopeless = np.full((50, len(POWERS)), -800.0)
    found = fit(hopeless, np.full(50, 0.5), "")
    assert found.weight == 1.0
    assert np.isfinite(found.apply(np.full((50, 2), -800.0), np.full(50, 0.5))[1]).all()
    assert len(labels_N) == found.tokens


def test_own_unigram_leaves_the_own_document_out():
    document_N = np.array([0, 0, 0, 1, 1, 2])
    label_N = np.array([3, 3, 1, 3, 2, 1])
    found = own_unigram(document_N, label_N, 5)
    for i in range(6):
        others = label_N[document_N != document_N[i]]
        assert found[i] == pytest.approx(((others == label_N[i]).sum() + 1) / (len(others) + 5))


def test_frequencies_add_one_and_sum_to_one():
    found = frequencies(np.array([0, 3, 1]))
    assert list(found) == pytest.approx([1 / 7, 4 / 7, 2 / 7])
