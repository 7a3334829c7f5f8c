"""Three ways: an fp64 truth written in probabilities, the readable reference, and the chunked path."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from divergence_definitions import definition
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import UserError
from tutelage.objective import (
    DIVERGENCES,
    Objective,
    TopK,
    TopP,
    chunked_objective,
    reference_objective,
)
from tutelage.objective.sparse import most_probable
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, LogitTransform, SparseTargets

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
ALPHAS = (0.0, 0.3, 1.0)
SPARSE_PAIRS = [
    *((name, "other_bucket") for name in DIVERGENCES),
    # reverse KL is infinite where the teacher has no mass and the student has
    *((name, "renormalise") for name in DIVERGENCES if name != "reverse_kl"),
    ("forward_kl", "none"),  # for unbiased samples, which forward KL alone has
]
EXTREMES = {
    "plain": {},
    "one token": {"n": 1, "d": 3, "e": 5, "v": 7},
    "over-confident student": {"student_scale": 20.0},  # logits of about +-80
    "one-hot teacher": {"teacher_scale": 20.0},
    "uniform teacher": {"teacher_scale": 0.0},
    "both extreme": {"student_scale": 20.0, "teacher_scale": 20.0, "n": 65, "v": 257},
}


def truth(problem, alpha, objective, sparse=None):
    """Value and gradients in float64, from the definitions; sparse targets are (ids, probs, tail)."""
    h, w = (x.double().clone().requires_grad_() for x in problem.student)
    keep = problem.labels != IGNORE_INDEX
    gold = problem.labels[keep].unsqueeze(1)
    logits = (h @ w.T)[keep]
    ce = -logits.log_softmax(-1).gather(1, gold).sum()
    ce_weight = 1.0 if objective.mixing == "keep_full_ce" else 1 - alpha
    kd_weight = 1.0 if objective.mixing == "keep_full_kd" else alpha
    kd = torch.zeros((), dtype=torch.float64)
    if problem.targets is not None:
        t = objective.temperature
        q = (logits / t).log_softmax(-1)
        if sparse is None:
            p = (problem.teacher_logits()[keep] / t).log_softmax(-1)
        else:
            ids, probs, tail = (x[keep] for x in sparse)
            dense = torch.zeros_like(q).scatter_add(1, ids, probs.double())
            if objective.tail == "renormalise":
                dense = dense / dense.sum(-1, keepdim=True)
            tail = tail.double().unsqueeze(1) if objective.tail == "other_bucket" else torch.zeros(len(q), 1)
            kept = dense > 0
            rest = q.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
            q = torch.cat([q.masked_fill(~kept, -torch.inf), rest], 1)
            p = torch.cat([dense, tail], 1).log()
        kd = objective.kd_scale * definition(objective.divergence, q, p, objective).sum()
    loss = ce_weight * ce + kd_weight * kd
    loss.backward()
    return loss.detach().numpy(), h.grad.numpy(), w.grad.numpy()


class Problem:
    """Random student, teacher and labels, with some labels masked."""

    def __init__(
        self, n=37, d=16, e=11, v=53, seed=0, student_scale=1.0, teacher_scale=1.0, dtype=torch.float32
    ):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(v, d, generator=g).to(dtype).float()  # master weights are float32
        hidden = (torch.randn(n, d, generator=g) * student_scale).to(dtype)
        self.student = hidden, weight
        self.labels = torch.randint(0, v, (n,), generator=g)
        if n > 1:
            self.labels[:: max(2, n // 4)] = IGNORE_INDEX
        teacher = (torch.randn(n, e, generator=g) * teacher_scale).to(dtype)
        self.targets = DenseTargets(teacher, torch.randn(v, e, generator=g).to(dtype))

    def teacher_logits(self):
        return self.targets.hidden_NE.double() @ self.targets.head_VE.double().T

    def sparse(self, k, temperature, tail=None):
        """Exact top-k in float64, rounded to float32, and the same as SparseTargets."""
        logp = (self.teacher_logits() / temperature).log_softmax(-1)
        top, ids = logp.topk(k)
        rest = logp.exp().scatter(1, ids, 0.0).sum(-1) if tail is None else torch.full(top.shape[:1], tail)
        gold = (
            self.teacher_logits().log_softmax(-1).gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        )
        return SparseTargets(ids, top.exp().float(), rest.float(), gold.float(), temperature)


def ours(function, problem, targets, alpha, objective, **student):
    h, w = (x.clone().requires_grad_() for x in problem.student)
    sums = function(h, w, problem.labels, targets, alpha, objective, **student)
    sums.loss.backward()
    return sums.loss.detach().double().numpy(), h.grad.double().numpy(), w.grad.double().numpy()


def assert_exact(problem, targets, alpha, objective, sparse=None, tolerance=1e-6):
    """Error of the chunked path <= error of the naive formula + tolerance, in value and both gradients.

    The tolerance is relative to the largest value, and grows with the logits: a float32 logit of 80 is only
    known to 5e-6, and both paths pass that on, each with its own rounding of the products.
    """
    expected = truth(problem, alpha, objective, sparse)
    naive = ours(reference_objective, problem, targets, alpha, objective)
    found = ours(chunked_objective, problem, targets, alpha, objective)
    logits = problem.student[0].float() @ problem.student[1].T, problem.teacher_logits()
    tolerance *= 1 + max(float(x.abs().max()) for x in logits) / objective.temperature / 10
    for true, plain, mine in zip(expected, naive, found, strict=True):
        scale = max(np.abs(true).max(), 1.0)
        assert np.isfinite(mine).all()
        assert np.abs(mine - true).max() <= np.abs(plain - true).max() + tolerance * scale
        assert np.abs(mine - true).max() <= 20 * tolerance * scale


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_targets(divergence, kind):
    problem = Problem(**EXTREMES[kind])
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
        objective = Objective(
            divergence=divergence, temperature=temperature, jsd_beta=0.3, skew=0.2, chunk_tokens=10
        )
        assert_exact(problem, problem.targets, alpha, objective)


@pytest.mark.parametrize("kind", ["plain", "over-confident student", "both extreme"])
@pytest.mark.parametrize(("divergence", "tail"), SPARSE_PAIRS)
def test_sparse_targets(divergence, tail, kind):
    problem = Problem(**EXTREMES[kind])
    v = problem.student[1].shape[0]
    for temperature, alpha, k in itertools.product(TEMPERATURES, (0.3, 1.0), (1, 7, v - 1)):
        objective = Objective(
            divergence=divergence, temperature=temperature, tail=tail, jsd_beta=0.3, skew=0.2, chunk_tokens=10
        )
        targets = problem.sparse(k, temperature)
        sparse = targets.ids_NK, targets.probs_NK, targets.tail_N
        if divergence == "reverse_kl" and (targets.tail_N == 0).any():
            continue  # infinite again, by underflow of the tail in float32
        assert_exact(problem, targets, alpha, objective, sparse, tolerance=2e-6)


@pytest.mark.parametrize("mixing", ["convex", "keep_full_ce", "keep_full_kd"])
@pytest.mark.parametrize("squared", [True, False])
def test_loss_scales_and_temperature_squared_in_value_and_gradient(mixing, squared):
    problem = Problem()
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
        objective = Objective(temperature=temperature, temperature_squared=squared, mixing=mixing)
        assert_exact(problem, problem.targets, alpha, objective)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_bfloat16_is_as_good_as_naive_bfloat16(divergence):
    problem = Problem(n=64, d=32, v=101, dtype=torch.bfloat16)
    for alpha in ALPHAS:
        objective = Objective(divergence=divergence, chunk_tokens=16)
        expected = truth(problem, alpha, objective)
        naive = ours(reference_objective, problem, problem.targets, alpha, objective)
        found = ours(chunked_objective, problem, problem.targets, alpha, objective)
        for true, plain, mine in zip(expected, naive, found, strict=True):
            assert np.abs(mine - true).max() <= 1.5 * np.abs(plain - true).max() + 1e-3


def assert_as_good_as_naive(problem, targets, alpha, objective, sparse=None):
    """Of the whole tensors, in norm: at most 1.5 times the naive formula's error and 0.001 of the truth.

    Single entries differ by one bfloat16 rounding (0.004) between any two orders of the same sums.
    """
    expected = truth(problem, alpha, objective, sparse)
    naive = ours(reference_objective, problem, targets, alpha, objective)
    found = ours(chunked_objective, problem, targets, alpha, objective)
    for true, plain, mine in zip(expected, naive, found, strict=True):
        error, naive_error = np.linalg.norm(mine - true), np.linalg.norm(plain - true)
        assert error <= 1.5 * naive_error + 1e-3 * np.linalg.norm(true)


@pytest.mark.parametrize("mixing", ["convex", "keep_full_ce", "keep_full_kd"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_dense_targets(divergence, mixing):
    problem = Problem(n=64, d=32, v=101, dtype=torch.bfloat16)
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
        objective = Objective(
            divergence=divergence, temperature=temperature, mixing=mixing, skew=0.2, chunk_tokens=16
        )
        assert_as_good_as_naive(problem, problem.targets, alpha, objective)


@pytest.mark.parametrize(("divergence", "tail"), SPARSE_PAIRS)
def test_bfloat16_sparse_targets(divergence, tail):
    problem = Problem(n=64, d=32, v=101, dtype=torch.bfloat16)
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
        objective = Objective(
            divergence=divergence, temperature=temperature, tail=tail, skew=0.2, chunk_tokens=16
        )
        targets = problem.sparse(7, temperature)
        sparse = targets.ids_NK, targets.probs_NK, targets.tail_N
        assert_as_good_as_naive(problem, targets, alpha, objective, sparse)


@pytest.mark.parametrize("tail_mass", [0.0, 1e-9, 1 - 1e-9])
@pytest.mark.parametrize("student_scale", [1.0, 20.0])
def test_tail_of_any_size_keeps_value_and_gradient(tail_mass, student_scale):
    problem = Problem(student_scale=student_scale)
    top = problem.sparse(5, 1.0)
    probs = top.probs_NK / top.probs_NK.sum(-1, keepdim=True) * (1 - tail_mass)
    targets = SparseTargets(top.ids_NK, probs, torch.full_like(top.tail_N, tail_mass), top.gold_logp_N)
    for alpha in (0.3, 1.0):
        sparse = targets.ids_NK, targets.probs_NK, targets.tail_N
        assert_exact(problem, targets, alpha, Objective(chunk_tokens=10), sparse, tolerance=2e-6)


FORMS = {
    "an unused slot that repeats nothing": lambda i, p, free: (
        torch.cat([free, i], 1),
        torch.cat([torch.zeros_like(free, dtype=p.dtype), p], 1),
    ),
    "mass in two slots": lambda i, p, _: (torch.cat([i, i.flip(1)], 1), torch.cat([p, p.flip(1)], 1) / 2),
    "mass in unequal slots": lambda i, p, _: (torch.cat([i, i], 1), torch.cat([p * 0.9, p * 0.1], 1)),
    "unsorted": lambda i, p, _: (i.roll(2, 1), p.roll(2, 1)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("divergence", "tail"), SPARSE_PAIRS)
def test_sparse_targets_in_any_form(divergence, tail, form):
    problem = Problem()
    for temperature in (1.0, 2.0):
        top = problem.sparse(5, temperature)
        free = problem.sparse(9, temperature).ids_NK[:, 6:]
        ids, probs = FORMS[form](top.ids_NK, top.probs_NK, free)
        targets = SparseTargets(ids, probs, top.tail_N, top.gold_logp_N, temperature)
        objective = Objective(divergence=divergence, temperature=temperature, tail=tail, chunk_tokens=10)
        assert_exact(problem, targets, 0.4, objective, (ids, probs, top.tail_N), tolerance=2e-6)
        both(problem, targets, 0.4, objective, top)
        if divergence == "forward_kl":  # one entry of .6 in two slots beats one of .4
            both(problem, targets, 0.4, Objective(divergence="hard_labels", temperature=temperature), top)


@pytest.mark.parametrize(("divergence", "tail"), SPARSE_PAIRS)
def test_tokens_of_which_nothing_is_kept(divergence, tail):
    problem = Problem()
    top = problem.sparse(5, 1.0)
    top.probs_NK[::3] = 0.0
    top.tail_N[::3] = 1.0
    objective = Objective(divergence=divergence, tail=tail, chunk_tokens=10)
    values = [ours(f, problem, top, 0.4, objective) for f in (reference_objective, chunked_objective)]
    for a, b in zip(*values, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    only = [problem.labels.clone(), problem.labels.clone()]
    only[0][::3] = IGNORE_INDEX
    only[1][torch.arange(37) % 3 > 0] = IGNORE_INDEX
    problem.labels = only[1]  # those tokens alone teach nothing: the gradient is that of the labels
    _, dh, dw = ours(chunked_objective, problem, top, 0.4, objective)
    _, plain_dh, plain_dw = ours(chunked_objective, problem, None, 0.0, objective)
    np.testing.assert_allclose(dh, 0.6 * plain_dh, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(dw, 0.6 * plain_dw, rtol=2e-5, atol=2e-6)


def both(problem, targets, alpha, objective, other_targets, other_objective=None):
    one = ours(chunked_objective, problem, targets, alpha, objective)
    two = ours(chunked_objective, problem, other_targets, alpha, other_objective or objective)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_of_the_whole_vocabulary_is_dense(divergence, temperature):
    problem = Problem()
    dense = Objective(divergence=divergence, temperature=temperature)
    both(problem, problem.sparse(53, temperature), 0.4, dense, problem.targets)
    both(
        problem,
        problem.targets,
        0.4,
        Objective(divergence=divergence, temperature=temperature, truncation=TopK(k=53)),
        problem.targets,
        dense,
    )


def test_truncating_dense_targets_is_the_same_as_sparse_ones():
    problem = Problem()
    for tail, temperature in itertools.product(("other_bucket", "renormalise"), TEMPERATURES):
        plain = Objective(temperature=temperature, tail=tail)
        cut = Objective(temperature=temperature, tail=tail, truncation=TopK(k=6), chunk_tokens=10)
        both(problem, problem.targets, 0.4, cut, problem.sparse(6, temperature), plain)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999999, 1.0])
def test_top_p_reaches_p_however_flat_the_teacher_is(p):
    generator = torch.Generator().manual_seed(0)
    for scale, vocab in ((0.0, 3000), (0.3, 32000), (1.0, 32000), (30.0, 300)):
        logp = (scale * torch.randn(3, vocab, generator=generator)).log_softmax(-1)
        logp[0] = torch.zeros(vocab).log_softmax(
            -1
        )  # beside a flat one, the others keep no more than they need
        ids, kept = most_probable(logp, None, p)
        mass = kept.double().exp().sum(-1)
        count = (kept > -torch.inf).sum(-1)
        assert (mass >= min(p, float(logp.double().exp().sum(-1).min())) - 1e-7).all()
        largest = logp.double().exp().sort(-1, descending=True).values
        assert ((largest.cumsum(-1) < p).sum(-1) + 1 - count).abs().max() <= (0 if p < 0.999 else vocab)
        if p == 1.0:
            assert (count == vocab).all()
        for n in range(3):
            used = ids[n][kept[n] > -torch.inf].tolist()
            assert len(set(used)) == len(used)
    bounded = most_probable(logp, 7, p)[1]
    assert bounded.shape[1] <= 7


def test_top_p_of_a_large_vocabulary_is_no_top_512():
    problem = Problem(n=4, e=8, v=32000, teacher_scale=0.5)
    objective = Objective(truncation=TopP(p=0.99), tail="other_bucket")
    values = [
        ours(f, problem, problem.targets, 1.0, objective) for f in (reference_objective, chunked_objective)
    ]
    for a, b in zip(*values, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    dense = ours(chunked_objective, problem, problem.targets, 1.0, Objective())
    assert abs(values[1][0] / dense[0] - 1) < 0.02  # a bucket of 1% of the mass loses little; of 20%, a tenth


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]).log()
    ids, kept = most_probable(logp, None, 0.9)
    assert (kept > -torch.inf).sum(-1).tolist() == [3, 1]
    assert ids[1].tolist() == [0, 0, 0]  # unused slots repeat a used id, and no token needs a fourth
    problem = Problem()
    whole = Objective(truncation=TopP(p=1.0))
    both(problem, problem.targets, 0.4, whole, problem.targets, Objective())
    for found in (
        ours(f, problem, problem.targets, 0.4, Objective(truncation=TopP(p=0.8)))
        for f in (reference_objective, chunked_objective)
    ):
        assert all(np.isfinite(x).all() for x in found)


def test_hard_labels_are_top_one_at_temperature_one_without_its_square():
    problem = Problem()
    hard = Objective(divergence="hard_labels", temperature=3.0)
    assert hard.kd_scale == 1.0
    top = Objective(truncation=TopK(k=1), tail="renormalise")
    both(problem, problem.targets, 0.4, hard, problem.targets, top)
    both(problem, problem.targets, 0.4, hard, problem.sparse(7, 3.0))
    sums = chunked_objective(*problem.student, problem.labels, problem.targets, 1.0, hard)
    keep = problem.labels != IGNORE_INDEX
    logits = (problem.student[0] @ problem.student[1].T)[keep]
    expected = torch.nn.functional.cross_entropy(
        logits, problem.teacher_logits()[keep].argmax(-1), reduction="sum"
    )
    assert sums.kd.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_as_targets_are_the_hidden_states_they_come_from():
    problem = Problem()
    both(problem, LogitTargets(problem.teacher_logits().float()), 0.4, Objective(), problem.targets)


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_padded_vocabularies_take_no_probability(divergence):
    problem = Problem()
    hidden, weight = problem.student
    padded = Problem()
    padded.student = hidden, torch.cat([weight, torch.randn(11, 16)])
    teacher = DenseTargets(
        problem.targets.hidden_NE, torch.cat([problem.targets.head_VE, torch.randn(3, 11)])
    )
    objective = Objective(divergence=divergence)
    expected = ours(chunked_objective, problem, problem.targets, 0.4, objective)
    for function in (reference_objective, chunked_objective):
        loss, dh, dw = ours(function, padded, teacher, 0.4, objective, vocab_size=53)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
        np.testing.assert_allclose(dh, expected[1], atol=1e-5)
        np.testing.assert_allclose(dw[:53], expected[2], atol=1e-5)
        assert not dw[53:].any()


@pytest.mark.parametrize(
    "transform", [LogitTransform(0.5), LogitTransform(1.0, 30.0), LogitTransform(2.0, 5.0)]
)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_logit_transforms_of_model_families(transform, divergence):
    problem = Problem()
    problem.targets = DenseTargets(problem.targets.hidden_NE, problem.targets.head_VE, transform)
    objective = Objective(divergence=divergence, temperature=2.0, chunk_tokens=10)
    whole = ours(reference_objective, problem, problem.targets, 0.4, objective, transform=transform)
    parts = ours(chunked_objective, problem, problem.targets, 0.4, objective, transform=transform)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    # the reference itself, against the families' own formula
    hidden, weight = problem.student
    logits = hidden.double() @ weight.double().T * transform.scale
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    ce = torch.nn.functional.cross_entropy(logits, problem.labels, reduction="sum")
    arguments = hidden, weight, problem.labels, problem.targets, 0.4, objective
    sums = reference_objective(*arguments, transform=transform)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-5)


def test_alpha_zero_is_plain_cross_entropy_with_and_without_a_teacher():
    problem = Problem()
    arguments = (*problem.student, problem.labels)
    alone = chunked_objective(*arguments, None, 0.0, Objective())
    taught = chunked_objective(*arguments, problem.targets, 0.0, Objective())
    plain = torch.nn.functional.cross_entropy(
        problem.student[0] @ problem.student[1].T, problem.labels, reduction="sum"
    )
    assert alone.loss == alone.ce
    assert taught.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)
    assert alone.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert taught.kd > 0


def test_all_tokens_masked_gives_zero_loss_and_zero_gradient():
    for divergence, sparse in itertools.product(DIVERGENCES, (False, True)):
        problem = Problem()
        targets = problem.sparse(5, 1.0) if sparse else problem.targets
        problem.labels = torch.full_like(problem.labels, IGNORE_INDEX)
        loss, dh, dw = ours(chunked_objective, problem, targets, 0.5, Objective(divergence=divergence))
        assert loss == 0
        assert not dh.any()
        assert not dw.any()


@given(
    n=st.integers(1, 40),
    v=st.integers(2, 70),
    chunk=st.integers(1, 50),
    alpha=st.floats(0, 1),
    masked=st.lists(st.integers(0, 39), max_size=20),
    k=st.integers(0, 8),
)
@settings(max_examples=80, deadline=None)
def test_any_chunk_size_and_mask_gives_the_same_result(n, v, chunk, alpha, masked, k):
    problem = Problem(n=n, v=v)
    problem.labels = problem.labels.clamp(min=0)
    problem.labels[[m for m in masked if m < n]] = IGNORE_INDEX
    targets = problem.sparse(min(k, v), 1.0) if k else problem.targets
    whole = ours(reference_objective, problem, targets, alpha, Objective())
    parts = ours(chunked_objective, problem, targets, alpha, Objective(chunk_tokens=chunk))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_sampled_targets_are_unbiased():
    """The mean gradient over many draws is the dense gradient, within 4 standard errors of the mean."""
    problem = Problem(n=6, d=4, v=31)
    expected = ours(chunked_objective, problem, problem.targets, 1.0, Objective())[1]
    p = problem.teacher_logits().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(4000):
        ids = torch.multinomial(p, 8, replacement=True, generator=generator)
        counts = torch.zeros_like(p).scatter_add_(1, ids, torch.ones_like(ids, dtype=p.dtype)) / 8
        weights, unique = counts.topk(8)
        unused = weights == 0
        unique = torch.where(unused, unique[:, :1], unique)
        targets = SparseTargets(unique, weights.float(), torch.zeros(6), torch.zeros(6))
        draws.append(ours(chunked_objective, problem, targets, 1.0, Objective(tail="none"))[1])
    mean, error = np.mean(draws, 0), np.std(draws, 0) / len(draws) ** 0.5
    assert (np.abs(mean - expected) <= 4 * error + 1e-6).all()
    assert np.abs(mean - expected).max() < 0.05 * np.abs(draws[0] - expected).max()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_keeps_its_contract(name):
    divergence, settings = DIVERGENCES[name], Objective(jsd_beta=0.3, skew=0.2)
    g = torch.Generator().manual_seed(1)
    s = torch.randn(9, 13, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(9, 13, generator=g, dtype=torch.float64).log_softmax(-1)
    value = divergence.value(s.log_softmax(-1), t, settings)
    assert (value > 0).all()
    assert divergence.value(t, t, settings).abs().max() < 1e-12  # zero at equality, so it is no soft CE
    torch.testing.assert_close(divergence.value((s + 5).log_softmax(-1), t, settings), value)  # logit shift
    (by_autograd,) = torch.autograd.grad(value.sum(), s)
    by_hand_value, by_hand = divergence.value_and_gradient(s.detach().log_softmax(-1), t.clone(), settings)
    torch.testing.assert_close(by_hand_value, value.detach())
    torch.testing.assert_close(by_hand, by_autograd)
    assert torch.autograd.gradcheck(lambda x: divergence.value(x.log_softmax(-1), t, settings), s)


def test_metrics_are_the_sums_they_say():
    problem = Problem()
    sums = chunked_objective(
        *problem.student, problem.labels, problem.targets, 0.3, Objective(temperature=2.0)
    )
    keep = problem.labels != IGNORE_INDEX
    teacher_ce = torch.nn.functional.cross_entropy(
        problem.teacher_logits()[keep], problem.labels[keep], reduction="sum"
    )
    assert sums.teacher_ce.item() == pytest.approx(teacher_ce.item(), rel=1e-5)
    assert sums.effective_alpha.item() == pytest.approx(0.3 * int(keep.sum()), rel=1e-5)
    assert sums.loss.item() == pytest.approx((0.7 * sums.ce + 0.3 * sums.kd).item(), rel=1e-5)


BAD = [
    ({"alpha": 1.5}, "alpha 1.5"),
    ({"alpha": -0.1}, "alpha -0.1"),
    ({"alpha": math.nan}, "alpha nan"),
    ({"targets": None}, "targets is None"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
    ({"labels": torch.zeros(37)}, "must be int64"),
    ({"labels": torch.full((37,), 53)}, "labels: 53 is outside"),
    ({"labels": torch.full((37,), -1)}, "labels: -1 is outside"),
    ({"weight": torch.zeros(53, 4)}, "hidden"),
    ({"weight": torch.full((53, 16), torch.nan)}, "weight: has 848 values that are NaN"),
    ({"hidden": torch.full((37, 16), torch.inf)}, "hidden: has 592 values"),
    ({"targets": DenseTargets(torch.zeros(37, 11), torch.zeros(54, 11))}, "teacher vocabulary 54"),
    ({"targets": DenseTargets(torch.zeros(36, 11), torch.zeros(53, 11))}, "targets.hidden"),
    ({"targets": DenseTargets(torch.zeros(37, 10), torch.zeros(53, 11))}, "targets.hidden"),
    ({"targets": LogitTargets(torch.zeros(37, 52))}, "teacher vocabulary 52"),
    ({"targets": LogitTargets(torch.full((37, 53), -torch.inf))}, "targets.logits: has 1961 values"),
    ({"targets": LogitTargets(torch.zeros(37, 53, dtype=torch.int64))}, "targets.logits is torch.int64"),
    ({"hidden": torch.zeros(37, 16, dtype=torch.int32)}, "hidden is torch.int32"),
    ({"targets": DenseTargets(torch.zeros(37, 11, device="meta"), torch.zeros(53, 11))}, "is on meta"),
    ({"objective": Objective(truncation=TopK(k=54))}, "top_k k = 54: above the vocabulary of 53"),
    ({"vocab_size": 54}, "vocab_size 54"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_inputs_are_named(change, message):
    problem = Problem()
    good = {
        "hidden": problem.student[0],
        "weight": problem.student[1],
        "labels": problem.labels,
        "targets": problem.targets,
        "alpha": 0.5,
        "objective": Objective(),
    }
    vocab_size = change.get("vocab_size")
    rest = {name: value for name, value in change.items() if name != "vocab_size"}
    for function in (reference_objective, chunked_objective):
        with pytest.raises(ValueError, match=message):
            function(*(good | rest).values(), vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_NK": torch.full((37, 5), 53)}, "targets.ids: 53 is outside"),
        ({"ids_NK": torch.full((37, 5), -1)}, "targets.ids: -1 is outside"),
        ({"probs_NK": torch.full((37, 5), 0.3)}, "they sum to"),
        ({"probs_NK": torch.full((37, 5), -0.1)}, "must not be negative"),
        ({"probs_NK": torch.full((37, 4), 0.1)}, "targets.probs"),
        ({"tail_N": torch.zeros(36)}, "targets.tail"),
        ({"temperature": 2.0}, "must equal the objective's"),
        ({"ids_NK": torch.zeros(37, 5, dtype=torch.int32)}, "targets.ids is torch.int32: must be int64"),
        ({"probs_NK": torch.full((37, 5), torch.nan)}, "targets.probs: has 185 values that are NaN"),
        ({"tail_N": torch.full((37,), torch.nan)}, "targets.tail: has 37 values that are NaN"),
    ],
)
def test_bad_sparse_targets_are_named(change, message):
    problem = Problem()
    good = problem.sparse(5, 1.0)
    names = ("ids_NK", "probs_NK", "tail_N", "gold_logp_N", "temperature")
    fields = dict(zip(names, (good.ids_NK, good.probs_NK, good.tail_N, good.gold_logp_N, 1.0), strict=True))
    targets = SparseTargets(**(fields | change))
    for function in (reference_objective, chunked_objective):
        with pytest.raises(ValueError, match=message):
            function(*problem.student, problem.labels, targets, 0.5, Objective())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "2"}, "Objective: temperature = '2': must be a number"),
        ({"divergence": "forward_kll"}, "did you mean 'forward_kl'"),
        ({"mixing": "half"}, "must be 'convex', 'keep_full_ce', 'keep_full_kd' or 'routed'"),
        ({"tail": "ghost"}, "must be 'other_bucket', 'renormalise' or 'none'"),
        ({"jsd_beta": 1.0}, "jsd_beta = 1.0: must be less than 1.0"),
        ({"skew": 0.0}, "skew = 0.0: must be more than 0.0"),
        ({"temprature": 2.0}, "temprature: unknown setting; did you mean 'temperature'"),
        ({"truncation": {"kind": "top"}}, "truncation.kind = 'top': unknown"),
        ({"truncation": {}}, "truncation.kind: required but not given; choose from top_k, top_p"),
        ({"divergence": "jsd", "tail": "none"}, "unbiased for forward_kl only"),
    ],
)
def test_objectives_that_make_no_sense(settings_, message):
    with pytest.raises(ValueError, match=message) as caught:
        Objective(**settings_)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_truncations_that_make_no_sense():
    for make in (lambda: TopK(k=0), lambda: TopP(p=0.0), lambda: TopP(p=1.5)):
        with pytest.raises(ValueError, match="must be"):
            make()
