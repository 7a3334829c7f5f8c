"""Calibration against plain recomputations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tutelage.evals.calibration import adaptive_edges, calibration_error, fixed_edges, reliability
from tutelage.evals.scoring import _calibrated
from tutelage.evals.token_scores import TokenScores

DOCUMENTS = 40


def scores(seed=0, tokens=4000, bias=0.0, documents=DOCUMENTS):
    """Tokens of a model that is right with its confidence plus `bias`."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.05, 0.8, tokens).astype(np.float32)
    correct = rng.random(tokens) < np.clip(confidence + bias, 0, 1)
    brier = rng.uniform(0, 2, tokens).astype(np.float32)
    document = np.sort(rng.integers(0, documents, tokens))
    document[:documents] = np.arange(documents)
    empty = np.zeros((0, 0))
    return TokenScores(
        document, *np.zeros((3, tokens), np.int64), -np.ones(tokens), confidence, correct, brier,
        np.zeros(tokens, bool), empty,
    )  # fmt: skip


def plain_error(confidence, correct, edges):
    """The textbook sum over bins, by comparing every token with every bin."""
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = [low <= c < high or (high == edges[-1] and c == high) for c in confidence]
        if any(inside):
            gap = np.mean(correct[inside]) - np.mean(confidence[inside].astype(np.float64))
            total += abs(gap) * np.sum(inside) / len(confidence)
    return total


@pytest.mark.parametrize("bins", ["fixed", "adaptive"])
@pytest.mark.parametrize("bias", [0.0, 0.15])
def test_calibration_error_is_the_sum_over_bins(bins, bias):
    tokens = scores(bias=bias)
    edges = fixed_edges() if bins == "fixed" else adaptive_edges(tokens.confidence_N)
    assert len(edges) == 16
    found = calibration_error(tokens, edges, DOCUMENTS)
    assert found.value == pytest.approx(plain_error(tokens.confidence_N, tokens.correct_N, edges), rel=1e-6)
    assert found.value == pytest.approx(bias, abs=0.03)
    assert found.low <= found.value <= found.high


def test_adaptive_bins_hold_equally_many_tokens():
    tokens = scores()
    curve = reliability(tokens, adaptive_edges(tokens.confidence_N))
    assert sum(point["tokens"] for point in curve) == 4000
    assert max(point["tokens"] for point in curve) - min(point["tokens"] for point in curve) <= 2
    same = np.full(100, 0.25, np.float32)
    assert list(adaptive_edges(same)) == [0.0, 0.25, 1.0]


def test_the_reliability_curve_is_the_mean_of_each_bin():
    tokens = scores(bias=0.1)
    for point in reliability(tokens, fixed_edges()):
        inside = (tokens.confidence_N >= point["low"]) & (tokens.confidence_N < point["high"])
        assert point["tokens"] == inside.sum()
        if point["tokens"]:
            assert point["confidence"] == pytest.approx(tokens.confidence_N[inside].mean(), rel=1e-5)
            assert point["accuracy"] == pytest.approx(tokens.correct_N[inside].mean())
        else:
            assert (point["confidence"], point["accuracy"]) == (None, None)


def test_brier_is_the_mean_over_tokens_with_noise_over_documents():
    tokens = scores()
    found, curves = _calibrated(tokens, DOCUMENTS)
    assert set(found) == {"ece", "ece_adaptive", "brier"}
    assert set(curves) == {"ece", "ece_adaptive"}
    assert found["brier"].value == pytest.approx(tokens.brier_N.mean(dtype=np.float64), rel=1e-6)
    mean = found["brier"].value
    residuals = [
        (tokens.brier_N[tokens.document_N == d].astype(np.float64) - mean).sum() for d in range(DOCUMENTS)
    ]
    expected = np.sqrt(DOCUMENTS / (DOCUMENTS - 1) * np.sum(np.square(residuals))) / 4000
    assert found["brier"].stderr == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_a_miscalibrated_model_covers_its_true_error():
    """Gap .15 in every bin, so the true error is .15; 100 replicates, nominal 95%."""
    covered = 0
    for seed in range(100):
        found = calibration_error(scores(seed, bias=0.15), fixed_edges(), DOCUMENTS)
        covered += found.low <= 0.15 <= found.high
    assert 88 <= covered <= 100


def test_one_document_has_no_interval():
    found = calibration_error(scores(documents=1), fixed_edges(), 1)
    assert np.isnan(found.stderr)
    assert (found.low, found.high) == (None, None)
