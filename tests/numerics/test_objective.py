"""Three ways: an fp64 truth written from the definition, the readable reference, and the chunked path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.objective import DIVERGENCES, Objective, chunked_objective, reference_objective
from tutelage.types import IGNORE_INDEX, DenseTargets

ALPHAS = (0.0, 0.3, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def truth(hidden, weight, labels, teacher_hidden, teacher_head, alpha, temperature, squared=True):
    """Value and gradients in float64 with numpy: p log p - p log q and its textbook logit gradient."""
    h, w = hidden.double().numpy(), weight.double().numpy()
    keep = labels.numpy() != IGNORE_INDEX
    gold = labels.numpy()[keep]
    s = (h @ w.T)[keep]
    rows = np.arange(len(gold))
    onehot = np.zeros_like(s)
    onehot[rows, gold] = 1
    log_z = np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1)) + s.max(-1)
    ce = (log_z - s[rows, gold]).sum()
    gradient = (1 - alpha) * (softmax(s) - onehot)
    kd = 0.0
    if alpha:
        t = (teacher_hidden.double().numpy() @ teacher_head.double().numpy().T)[keep] / temperature
        u = s / temperature
        p = softmax(t)
        log_p = t - t.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        log_q = u - u.max(-1, keepdims=True)
        log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
        scale = temperature**2 if squared else 1.0
        kd = scale * (p * log_p - p * log_q).sum()
        gradient += alpha * scale / temperature * (softmax(u) - p)
    full = np.zeros((len(h), w.shape[0]))
    full[keep] = gradient
    return (1 - alpha) * ce + alpha * kd, full @ w, full.T @ h


def problem(n=37, d=16, e=11, v=53, seed=0, student_scale=1.0, teacher_scale=1.0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=g)
    hidden = torch.randn(n, d, generator=g) * student_scale
    labels = torch.randint(0, v, (n,), generator=g)
    labels[:: max(2, n // 4)] = IGNORE_INDEX
    teacher_hidden = torch.randn(n, e, generator=g) * teacher_scale
    return hidden, weight, labels, teacher_hidden, torch.randn(v, e, generator=g)


def ours(function, inputs, alpha, objective):
    hidden, weight, labels, teacher_hidden, teacher_head = inputs
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    targets = DenseTargets(teacher_hidden, teacher_head) if alpha else None
    sums = function(h, w, labels, targets, alpha, objective)
    sums.loss.backward()
    return sums.loss.detach().double().numpy(), h.grad.double().numpy(), w.grad.double().numpy()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"n": 1, "d": 3, "e": 5, "v": 7},
        {"student_scale": 20.0},  # over-confident student: logits of about +-80
        {"teacher_scale": 20.0},  # nearly one-hot teacher, most of its mass exactly zero
        {"teacher_scale": 0.0},  # uniform teacher
        {"student_scale": 20.0, "teacher_scale": 20.0, "n": 129, "v": 257},
    ],
)
def test_chunked_is_as_exact_as_the_naive_formula(kind, alpha, temperature):
    inputs = problem(**kind)
    objective = Objective(temperature=temperature, chunk_tokens=10)
    expected = truth(*inputs, alpha, temperature)
    naive = ours(reference_objective, inputs, alpha, objective)
    chunked = ours(chunked_objective, inputs, alpha, objective)
    for true, plain, found in zip(expected, naive, chunked, strict=True):
        scale = np.abs(true).max()
        assert np.isfinite(found).all()
        assert np.abs(found - true).max() <= np.abs(plain - true).max() + 1e-6 * max(scale, 1.0)
        assert np.abs(found - true).max() <= 1e-5 * max(scale, 1.0)


def test_temperature_squared_is_in_value_and_gradient():
    inputs = problem()
    for squared in (True, False):
        objective = Objective(temperature=3.0, temperature_squared=squared)
        expected = truth(*inputs, 1.0, 3.0, squared=squared)
        for true, found in zip(expected, ours(chunked_objective, inputs, 1.0, objective), strict=True):
            np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5)


def test_alpha_zero_is_plain_cross_entropy_bitwise_with_and_without_a_teacher():
    hidden, weight, labels, teacher_hidden, teacher_head = problem()
    objective = Objective()
    alone = chunked_objective(hidden, weight, labels, None, 0.0, objective)
    taught = chunked_objective(
        hidden, weight, labels, DenseTargets(teacher_hidden, teacher_head), 0.0, objective
    )
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert alone.loss == taught.loss == alone.ce
    assert alone.loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_divergence_is_zero_at_equality_and_reports_teacher_cross_entropy():
    hidden, weight, labels, *_ = problem()
    sums = chunked_objective(hidden, weight, labels, DenseTargets(hidden, weight), 0.5, Objective())
    assert abs(sums.kd.item()) < 1e-4
    assert sums.teacher_ce.item() == pytest.approx(sums.ce.item(), rel=1e-6)


def test_all_tokens_masked_gives_zero_loss_and_zero_gradient():
    hidden, weight, labels, teacher_hidden, teacher_head = problem()
    labels = torch.full_like(labels, IGNORE_INDEX)
    loss, dh, dw = ours(
        chunked_objective, (hidden, weight, labels, teacher_hidden, teacher_head), 0.5, Objective()
    )
    assert loss == 0
    assert not dh.any()
    assert not dw.any()


@given(
    n=st.integers(1, 40),
    v=st.integers(2, 70),
    chunk=st.integers(1, 50),
    alpha=st.floats(0, 1),
    masked=st.lists(st.integers(0, 39), max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_any_chunk_size_and_mask_gives_the_same_result(n, v, chunk, alpha, masked):
    hidden, weight, labels, teacher_hidden, teacher_head = problem(n=n, v=v)
    labels = labels.clamp(min=0)
    labels[[m for m in masked if m < n]] = IGNORE_INDEX
    inputs = hidden, weight, labels, teacher_hidden, teacher_head
    whole = ours(reference_objective, inputs, alpha, Objective())
    parts = ours(chunked_objective, inputs, alpha, Objective(chunk_tokens=chunk))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_keeps_its_contract(name):
    divergence = DIVERGENCES[name]
    g = torch.Generator().manual_seed(1)
    s = torch.randn(9, 13, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(9, 13, generator=g, dtype=torch.float64).log_softmax(-1)
    value = divergence.value(s.log_softmax(-1), t)
    assert (value > 0).all()
    assert divergence.value(t, t).abs().max() < 1e-12
    torch.testing.assert_close(divergence.value((s + 5).log_softmax(-1), t), value)  # logit shift
    (by_autograd,) = torch.autograd.grad(value.sum(), s)
    by_hand_value, by_hand = divergence.value_and_gradient(s.detach().log_softmax(-1), t.clone())
    torch.testing.assert_close(by_hand_value, value.detach())
    torch.testing.assert_close(by_hand, by_autograd)
    torch.autograd.gradcheck(lambda x: divergence.value(x.log_softmax(-1), t), s)


def test_bfloat16_is_as_good_as_naive_bfloat16():
    inputs = problem(n=64, d=32, v=101)
    low = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    low[1] = inputs[1].bfloat16().float()  # master weights stay float32
    exact = truth(low[0].float(), low[1], low[2], low[3].float(), low[4].float(), 0.5, 1.0)
    naive = ours(reference_objective, low, 0.5, Objective())
    found = ours(chunked_objective, low, 0.5, Objective(chunk_tokens=16))
    for true, plain, mine in zip(exact, naive, found, strict=True):
        assert np.abs(mine - true).max() <= 1.5 * np.abs(plain - true).max() + 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": 0.5, "targets": None}, "targets is None"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"weight": torch.zeros(53, 4)}, "hidden"),
        ({"targets": DenseTargets(torch.zeros(37, 11), torch.zeros(54, 11))}, "teacher vocabulary 54"),
        ({"targets": DenseTargets(torch.zeros(36, 11), torch.zeros(53, 11))}, "teacher hidden"),
    ],
)
def test_bad_inputs_are_named(change, message):
    hidden, weight, labels, teacher_hidden, teacher_head = problem()
    inputs = {
        "weight": weight,
        "labels": labels,
        "targets": DenseTargets(teacher_hidden, teacher_head),
        "alpha": 0.5,
    }
    inputs |= change
    for function in (reference_objective, chunked_objective):
        with pytest.raises(ValueError, match=message):
            function(
                hidden, inputs["weight"], inputs["labels"], inputs["targets"], inputs["alpha"], Objective()
            )


def test_temperature_must_be_positive_and_divergence_known():
    with pytest.raises(ValueError, match="temperature"):
        Objective(temperature=0.0)
    with pytest.raises(ValueError, match="choose one of"):
        Objective(divergence="forward_kll")
