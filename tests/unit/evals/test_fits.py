"""The fits recover what was put in, and take a smoothed model's advantage away."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.evals.calibration import POWERS, fit, foreign_noise, frequencies, mixed, own_unigram

V, N = 40, 6000
DOCUMENT_N = np.arange(N) // 100


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


def fit_of(logits_NV, labels_N, unigram_V):
    return fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], DOCUMENT_N[: len(labels_N)])


def repaired(found, logits_NV, labels_N, unigram_V):
    """Log-probabilities with the temperature alone, and with the mixture."""
    powers = (1 / found.temperature, 1 / found.mixed_temperature)
    alone_N, mixed_N = at_powers(logits_NV, labels_N, powers).T
    return alone_N, mixed(mixed_N, unigram_V[labels_N], found.weight)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7, 3.0])
def test_a_known_temperature_is_found(world, temperature):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, np.exp(log_softmax(logits_NV / temperature)))
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], DOCUMENT_N)
    assert found.temperature == pytest.approx(temperature, rel=0.06)
    assert found.weight < 0.06
    assert (found.tokens, found.documents) == (N, 60)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.3), (1.5, 0.5), (1.0, 0.0)])
def test_a_known_mixture_is_found(world, temperature, weight):
    rng, logits_NV, unigram_V = world
    p_NV = (1 - weight) * np.exp(log_softmax(logits_NV / temperature)) + weight * unigram_V
    labels_N = drawn(rng, p_NV)
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], DOCUMENT_N)
    assert found.weight == pytest.approx(weight, abs=0.05)
    assert found.mixed_temperature == pytest.approx(temperature, rel=0.15)


def test_the_fit_is_the_best_of_a_fine_grid(world):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, 0.7 * np.exp(log_softmax(logits_NV / 2)) + 0.3 * unigram_V)
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], DOCUMENT_N)
    alone_N, mixed_N = repaired(found, logits_NV, labels_N, unigram_V)
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
    raw, fair = {}, {}
    for name, logits in (("sharp", logits_NV), ("hedged", hedged_NV)):
        validation, test = halves
        fitted = fit_of(logits[validation], labels_N[validation], unigram_V)
        raw[name] = -at_powers(logits[test], labels_N[test], [1.0]).mean()
        fair[name] = -repaired(fitted, logits[test], labels_N[test], unigram_V)[1].mean()
    assert raw["sharp"] - raw["hedged"] > 0.2
    assert abs(fair["sharp"] - fair["hedged"]) < 0.05 * (raw["sharp"] - raw["hedged"])


def test_weights_at_the_ends():
    sure = np.full((50, len(POWERS)), -1e-9)
    assert fit(sure, np.full(50, 0.01), np.arange(50)).weight == 0.0
    hopeless = np.full((50, len(POWERS)), -800.0)
    found = fit(hopeless, np.full(50, 0.5), np.arange(50))
    assert found.weight == 1.0
    assert np.isfinite(mixed(np.full(50, -800.0), np.full(50, 0.5), found.weight)).all()
    assert np.isfinite(found.mixed_noise.nats(9))


@pytest.mark.parametrize(("temperature", "found"), [(9.0, 5.0), (0.2, 1 / 3)])
def test_temperatures_are_found_from_a_third_to_five(world, temperature, found):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, np.exp(log_softmax(logits_NV / temperature)))
    at_end = fit_of(logits_NV, labels_N, unigram_V)
    assert at_end.temperature == pytest.approx(found, rel=1e-12)
    # On other documents the fit ends there too, so that a score does not move, on foreign text neither.
    assert (at_end.alone_noise.nats(9), at_end.variance) == (0.0, 0.0)
    assert foreign_noise(at_powers(logits_NV, labels_N[::-1]), at_end) == 0.0


def test_a_share_of_unigram_has_its_own_noise_beside_a_temperature_at_the_end(world):
    rng, logits_NV, unigram_V = world
    labels_N = drawn(rng, 0.6 * np.exp(log_softmax(logits_NV / 9)) + 0.4 * unigram_V)
    found = fit_of(logits_NV, labels_N, unigram_V)
    assert (found.mixed_temperature, 0 < found.weight < 1) == (pytest.approx(5.0), True)
    p_N, u_N = np.exp(at_powers(logits_NV, labels_N, [0.2])[:, 0]), unigram_V[labels_N]
    slope_N = (p_N - u_N) / ((1 - found.weight) * p_N + found.weight * u_N)
    sums_D = np.bincount(DOCUMENT_N, slope_N)
    spread, curvature = len(sums_D) * sums_D.var(ddof=1), (slope_N**2).sum()
    assert found.mixed_noise.linear == pytest.approx(np.sqrt(len(sums_D)) * spread / curvature / N, rel=1e-3)


def test_a_unigram_of_no_use_adds_no_noise(world):
    """Its weight is held at 0 by the bound, so it is the fit of the temperature alone."""
    rng, logits_NV, _ = world
    labels_N = drawn(rng, np.exp(log_softmax(logits_NV / 1.5)))
    less_N = np.exp(at_powers(logits_NV, labels_N, [1 / 1.5])[:, 0]) * rng.uniform(0.1, 0.9, N)
    found = fit(at_powers(logits_NV, labels_N), less_N, DOCUMENT_N)
    assert found.weight == 0.0
    assert found.mixed_noise.linear == pytest.approx(found.alone_noise.linear, rel=1e-3)
    assert found.mixed_noise.curved == pytest.approx(found.alone_noise.curved, rel=1e-3)


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


def many_texts(draws, documents, size, seed=0):
    """Texts of documents that differ: each has its own temperature and share of the unigram."""
    rng = np.random.default_rng(seed)
    unigram_V = frequencies(rng.integers(1, 2000, V))
    owner_N = np.repeat(np.arange(documents), size)
    for _ in range(draws):
        logits_NV = rng.normal(0, 2.0, (documents * size, V))
        heat_N1 = np.exp(rng.normal(0.3, 0.3, documents))[owner_N][:, None]
        weight_N1 = rng.uniform(0.1, 0.5, documents)[owner_N][:, None]
        p_NV = (1 - weight_N1) * np.exp(log_softmax(logits_NV / heat_N1)) + weight_N1 * unigram_V
        yield logits_NV, drawn(rng, p_NV), owner_N, unigram_V


def test_the_stated_error_is_that_of_fits_on_other_documents():
    """Against brute force: the score of one text by fits on many others, less that by the best fit."""
    documents, size, draws = 24, 100, 60
    *texts, (logits_NV, labels_N, owner_N, unigram_V) = many_texts(draws + 1, documents, size)
    best = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], owner_N)
    everything = [np.concatenate(column) for column in list(zip(*texts, strict=True))[:2]]
    truth = fit(at_powers(*everything), unigram_V[everything[1]], np.arange(draws * len(owner_N)) // size)
    fits = [fit(at_powers(logits, labels), unigram_V[labels], owner) for logits, labels, owner, _ in texts]
    errors, stated = {"alone": [], "mixed": []}, {"alone": [], "mixed": []}
    for one, (test_NV, test_N, *_) in zip(fits, [*texts[1:], texts[0]], strict=True):
        ours, theirs = (repaired(found, test_NV, test_N, unigram_V) for found in (one, truth))
        for place, name in enumerate(("alone", "mixed")):
            errors[name].append(ours[place].mean() - theirs[place].mean())
        stated["alone"].append(one.alone_noise.nats(documents))
        stated["mixed"].append(one.mixed_noise.nats(documents))
    for name in ("alone", "mixed"):
        seen = np.sqrt(np.mean(np.square(errors[name])))
        assert np.sqrt(np.mean(np.square(stated[name]))) == pytest.approx(seen, rel=0.35)
    assert best.alone_noise.nats(documents) < 0.02


def test_the_error_of_a_foreign_temperature_is_that_of_fits_on_other_documents():
    texts = list(many_texts(40, 24, 100))
    fits = [
        fit(at_powers(logits, labels), unigram_V[labels], owner) for logits, labels, owner, unigram_V in texts
    ]
    rng = np.random.default_rng(5)
    logits_NV = rng.normal(0, 2.0, (4000, V))
    labels_N = drawn(rng, np.exp(log_softmax(logits_NV / 3)))
    scores = [at_powers(logits_NV, labels_N, [1 / found.temperature]).mean() for found in fits]
    stated = [foreign_noise(at_powers(logits_NV, labels_N), found) for found in fits]
    assert np.mean(stated) == pytest.approx(np.std(scores), rel=0.3)


def test_a_fit_on_one_document_has_no_error():
    (text,) = many_texts(1, 1, 200)
    logits_NV, labels_N, owner_N, unigram_V = text
    found = fit(at_powers(logits_NV, labels_N), unigram_V[labels_N], owner_N)
    assert np.isnan([found.variance, found.alone_noise.nats(3), found.mixed_noise.nats(3)]).all()
