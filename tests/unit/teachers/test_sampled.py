"""The samplers against their definitions: inclusion probabilities, tau, variance, extreme teachers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.teachers.cache import sampled
from tutelage.teachers.cache.sampled import min_variance, multinomial

SIGMAS = 5


def zipf(vocab: int, exponent: float = 1.3) -> torch.Tensor:
    """Logits of p ~ rank^-exponent, ranks scattered over the ids."""
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))
    return -exponent * torch.log1p(order.float())


def weights(kept, vocab: int) -> torch.Tensor:
    """[N, V] weights, without any rounding."""
    k = kept.ids_NK.shape[1]
    light_N1 = (kept.light_N / (k - kept.heavy_N).clamp(min=1)).unsqueeze(1)
    heavy_NK = torch.arange(k) < kept.heavy_N.unsqueeze(1)
    weights_NK = torch.where(heavy_NK, kept.probs_NK, light_N1)
    return torch.zeros(len(weights_NK), vocab, dtype=torch.float64).scatter_add_(1, kept.ids_NK, weights_NK)


def threshold(p: np.ndarray, k: int) -> tuple[int, float]:
    """(heavy ids, tau) by the definition."""
    p = np.sort(p)[::-1]
    for heavy in range(k):
        tau = p[heavy:].sum() / (k - heavy)
        if p[heavy] < tau:
            return heavy, tau
    return k, 0.0


@pytest.mark.parametrize("vocab", [40, 1000, 5000])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_inclusion_probabilities_are_exact(vocab, k):
    """Evenly spaced uniform numbers integrate over the sampler: the mean is p but for the spacing."""
    points = 4000
    logits_V = zipf(vocab)
    p_V = logits_V.double().softmax(-1)
    heavy, tau = threshold(p_V.numpy(), k)
    uniform_N = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    mean_V = torch.zeros(vocab, dtype=torch.float64)
    for part_N in uniform_N.split(500):
        kept = min_variance(logits_V.repeat(len(part_N), 1), k, part_N)
        assert (kept.heavy_N == heavy).all()
        mean_V += weights(kept, vocab).sum(0) / points
    assert (mean_V - p_V).abs().max() < max(tau, 0.01) / points + 1e-7


@pytest.mark.parametrize("k", [4, 16])
def test_min_variance_is_unbiased_and_has_its_variance(k):
    vocab, draws = 300, 20_000
    logits_V = zipf(vocab)
    p_V = logits_V.double().softmax(-1)
    heavy, tau = threshold(p_V.numpy(), k)
    uniform_N = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = min_variance(logits_V.repeat(draws, 1), k, uniform_N)
    weights_NV = weights(kept, vocab)
    torch.testing.assert_close(weights_NV.sum(-1), torch.ones(draws, dtype=torch.float64))
    variance_V = torch.where(p_V < tau, p_V * (tau - p_V), 0.0)
    assert ((weights_NV.mean(0) - p_V).abs() <= SIGMAS * (variance_V / draws).sqrt() + 1e-7).all()
    assert weights_NV.var(0).sum() == pytest.approx(float(variance_V.sum()), rel=0.05)
    assert heavy < k


def test_multinomial_is_unbiased_and_has_its_variance():
    vocab, draws, n = 1000, 6, 20_000  # fewer draws than groups: both levels are walked
    logits_V = zipf(vocab)
    p_V = logits_V.double().softmax(-1)
    uniform_NJ = torch.rand(n, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids_NJ = torch.cat([multinomial(logits_V.repeat(len(u), 1), u) for u in uniform_NJ.split(2000)])
    assert (ids_NJ.diff(dim=-1) >= 0).all()
    shares_NV = torch.zeros(n, vocab).scatter_add_(1, ids_NJ, torch.full(ids_NJ.shape, 1 / draws))
    variance_V = p_V * (1 - p_V) / draws
    assert ((shares_NV.mean(0) - p_V).abs() <= SIGMAS * (variance_V / n).sqrt() + 1e-7).all()
    assert shares_NV.var(0).sum() == pytest.approx(float(variance_V.sum()), rel=0.05)


@pytest.mark.parametrize("k", [1, 5, 12, 50, 200])
@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.3, 3.0])
def test_min_variance_has_less_variance_than_as_many_draws(k, exponent):
    p_V = zipf(1000, exponent).double().softmax(-1)
    _, tau = threshold(p_V.numpy(), k)
    min_variance = torch.where(p_V < tau, p_V * (tau - p_V), 0.0).sum()
    assert min_variance <= (p_V * (1 - p_V)).sum() / k + 1e-12


@given(
    st.integers(1, 700), st.integers(1, 40), st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0, 1e4]),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ids_are_different_and_mass_is_kept(vocab, k, spread, seed):
    k = min(k, vocab)
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(20, vocab, generator=generator) * spread
    uniform_N = torch.rand(20, dtype=torch.float64, generator=generator).clamp(1e-12, 1 - 1e-12)
    kept = min_variance(logits_NV.clone(), k, uniform_N)
    assert (kept.ids_NK >= 0).all()
    assert (kept.ids_NK < vocab).all()
    assert (kept.ids_NK.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(weights(kept, vocab).sum(-1), torch.ones(20, dtype=torch.float64))
    light_NK = torch.arange(k) >= kept.heavy_N.unsqueeze(1)
    assert (logits_NV.softmax(-1).gather(1, kept.ids_NK)[light_NK] > 0).all()


def test_equal_probabilities_are_sampled_without_repeats():
    """Ties on tau, where rounding would let one id span two points."""
    for vocab, k in ((16, 16), (100, 99), (1024, 8), (1000, 1000), (3000, 20)):
        kept = min_variance(torch.zeros(50, vocab), k, torch.linspace(0.001, 0.999, 50).double())
        assert (kept.ids_NK.sort(-1).values.diff(dim=-1) > 0).all()
        total_N = weights(kept, vocab).sum(-1)
        torch.testing.assert_close(total_N, torch.ones_like(total_N))


@pytest.mark.parametrize("vocab", [5, 300, 5000])
def test_one_certain_id(vocab):
    logits_NV = torch.full((3, vocab), -200.0)
    logits_NV[:, 4] = 0
    kept = min_variance(logits_NV.clone(), 4, torch.full((3,), 0.5, dtype=torch.float64))
    weights_NV = weights(kept, vocab)
    torch.testing.assert_close(weights_NV, logits_NV.double().softmax(-1), rtol=0, atol=1e-30)
    assert (kept.ids_NK[:, 0] == 4).all()
    draws = multinomial(logits_NV, torch.linspace(1e-9, 1 - 1e-9, 9).double().expand(3, -1))
    assert (draws == 4).all()


def test_the_last_slot_does_not_swallow_what_is_outside():
    """p = (1 - 4e-6, 4e-6) with one slot: the small one is drawn in 4 of a million."""
    logits_NV = torch.tensor([[0.0, -12.43]]).repeat(2, 1)
    kept = min_variance(logits_NV, 1, torch.tensor([1 - 1e-6, 1 - 1e-5], dtype=torch.float64))
    assert kept.heavy_N.tolist() == [0, 0]
    assert kept.ids_NK.tolist() == [[1], [0]]


def test_what_a_sharp_teacher_leaves_is_still_shared_out():
    """A mass of 1e-9 beside 1: lost if it were found as 1 less the largest."""
    vocab = 2000
    logits_V = torch.full((vocab,), -28.0)
    logits_V[7] = 0
    kept = min_variance(logits_V.repeat(2, 1), 3, torch.tensor([0.2, 0.7], dtype=torch.float64))
    assert kept.heavy_N.tolist() == [1, 1]
    expected = torch.full((2,), 1999 * np.exp(-28.0))
    torch.testing.assert_close(kept.light_N, expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab", [130, 1000, 3001])
def test_two_levels_find_what_one_level_finds(vocab):
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(30, vocab, generator=generator) * 3
    grouped = sampled._grouped(logits_NV)
    assert (sampled._largest(grouped, 2) == logits_NV.topk(2).indices).all()
    assert (sampled._largest(grouped, 100) == logits_NV.topk(100).indices).all()
    mass_NV = grouped.flatten(1).softmax(-1)
    fraction_NJ = torch.rand(30, 2, dtype=torch.float64, generator=generator)
    found_NJ = sampled._locate(mass_NV.view_as(grouped), fraction_NJ)
    running = mass_NV.double().cumsum(-1).numpy()
    expected = [
        [np.searchsorted(row, x * row[-1], side="right") for x in points]
        for row, points in zip(running, fraction_NJ.numpy(), strict=True)
    ]
    assert (found_NJ.numpy() == np.array(expected)).mean() > 0.98  # float32 sums may move a point by 1e-7
    assert (found_NJ - torch.tensor(np.array(expected))).abs().max() <= 1
