"""The row kernels against a truth in float64 numpy, and against the naive formula in float32.

The truth knows nothing of softmax identities: a loss is sum_g P_g (log P_g - log Q_g) over groups of
entries, dL/dq is written down per group, and the softmax's full Jacobian takes it to the logits.

In a process started with TRITON_INTERPRET=1 the same tests run over the Triton kernels, at small shapes,
and in one started with TUTELAGE_KERNELS=triton on a GPU. `test_the_triton_kernels_pass_too` starts both.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tutelage.errors import UserError
from tutelage.objective import kernels as dispatch
from tutelage.objective.kernels import rows
from tutelage.types import IGNORE_INDEX

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and os.environ.get(dispatch.VARIABLE) == "triton" and not INTERPRETED
TRITON = INTERPRETED or ON_GPU
DEVICE = "cuda" if ON_GPU else "cpu"


def on_gpu(function, kernel):
    """Row kernels for CPU tensors, by way of a GPU: every call takes another of these block sizes."""
    blocks = itertools.cycle([c for c in kernel.configs if c.kwargs["BLOCK"] in (1024, 8192, 16384)])

    def call(logits, *rest):
        kernel.configs = [next(blocks)]  # to time them for every vocabulary would take minutes
        moved = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda")
        moved.copy_(logits)
        there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in rest]
        outputs = function(moved, *there)
        logits.copy_(moved)
        if isinstance(rest[-1], torch.Tensor):  # addends of the gradient
            rest[-1].copy_(there[-1])
        return tuple(output.cpu() for output in outputs)

    return call


if TRITON:
    from tutelage.objective.kernels import triton_kernels, triton_rows

    DENSE, SPARSE = triton_rows.dense_rows, triton_rows.sparse_rows
    SHAPES = [(1, 2), (3, 150)]
    if ON_GPU:
        DENSE, SPARSE = (
            on_gpu(DENSE, triton_kernels.dense_kernel),
            on_gpu(SPARSE, triton_kernels.sparse_kernel),
        )
        SHAPES = [(1, 2), (37, 53), (5, 20_011)]
else:
    DENSE, SPARSE = rows.dense_rows, rows.sparse_rows
    SHAPES = [(1, 2), (37, 53), (129, 257)]

torch_only = pytest.mark.skipif(TRITON, reason="about the torch rows or the dispatch")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no triton for this system"
)

TEMPERATURES = [0.5, 1.0, 2.0, 4.0]
POLICIES = ["renormalise", "none", "other_bucket"]
DTYPES = [torch.float32, torch.bfloat16]
IDS = {"ids": str}


def truth(logits_V, groups_V, teacher_G, temperature):
    """Value and logit gradient of sum_g P_g (log P_g - log Q_g), Q_g = sum of softmax(s / T) in group g."""
    scaled = logits_V / temperature
    logq = scaled - np.logaddexp.reduce(scaled)
    used = np.unique(groups_V[np.isfinite(logq)])
    log_group = np.full(len(teacher_G), -np.inf)
    for group in used:
        log_group[group] = np.logaddexp.reduce(logq[groups_V == group])
    positive = teacher_G > 0
    value = np.sum(teacher_G[positive] * (np.log(teacher_G[positive]) - log_group[positive]))
    ratio_G = np.zeros_like(teacher_G)
    ratio_G[positive] = -teacher_G[positive] / np.exp(log_group[positive])
    dq = ratio_G[groups_V]
    q = np.exp(logq)
    return value, q * (dq - np.sum(q * dq)) / temperature


def onehot(label, vocab):
    return (np.arange(vocab) == label).astype(np.float64)


def softmax(x):
    return np.exp(x - np.logaddexp.reduce(x))


def as_rows(pairs):
    values, gradients = zip(*pairs, strict=True)
    return np.array(values), np.stack(gradients)


def true_ce(logits, labels):
    vocab = logits.shape[1]
    pairs = [
        truth(s, np.arange(vocab), onehot(label, vocab), 1.0) if label >= 0 else (0.0, np.zeros(vocab))
        for s, label in zip(logits, labels, strict=True)
    ]
    return as_rows(pairs)


def true_dense(logits, teacher, labels, temperature):
    vocab = logits.shape[1]
    pairs = [
        truth(s, np.arange(vocab), softmax(t / temperature), temperature)
        if label >= 0
        else (0.0, np.zeros(vocab))
        for s, t, label in zip(logits, teacher, labels, strict=True)
    ]
    return as_rows(pairs)


def true_sparse(logits, ids, probs, tail, labels, temperature, policy):
    """Groups: one per kept entry, and one more for all others, in which only the bucket puts mass."""
    vocab = logits.shape[1]
    pairs = []
    for n in range(len(logits)):
        if labels[n] < 0:
            pairs.append((0.0, np.zeros(vocab)))
            continue
        kept = list(dict.fromkeys(ids[n][probs[n] > 0].tolist()))
        mass = np.array([probs[n][ids[n] == v].sum() for v in kept])
        if policy == "renormalise" and kept:
            mass = mass / mass.sum()
        bucket = tail[n] if policy == "other_bucket" and len(kept) < vocab else 0.0
        groups = np.full(vocab, len(kept))
        groups[np.array(kept, int)] = np.arange(len(kept))
        pairs.append(truth(logits[n], groups, np.append(mass, bucket), temperature))
    return as_rows(pairs)


def naive(loss_of, logits):
    """Value per row and gradient by autograd in float32 (or what the logits are), ignored rows excepted."""
    leaf = logits.clone().requires_grad_()
    value_N = loss_of(leaf)
    (gradient,) = torch.autograd.grad(value_N.sum(), leaf)
    return value_N.detach().double().numpy(), gradient.double().numpy()


def naive_ce(labels):
    return lambda s: F.cross_entropy(s.float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


def naive_dense(teacher, labels, t):
    def loss(s):
        logp, logq = (teacher.float() / t).log_softmax(-1), (s.float() / t).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1).masked_fill(labels == IGNORE_INDEX, 0.0)

    return loss


def naive_sparse(ids, probs, tail, labels, t, policy):
    def loss(s):
        logq = (s.float() / t).log_softmax(-1)
        p = torch.zeros_like(logq).scatter_add(1, ids, probs)
        rest = p == 0
        if policy == "renormalise":
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
        value = (torch.xlogy(p, p) - torch.where(p > 0, p * logq, 0.0)).sum(-1)
        if policy == "other_bucket" and rest.any():
            log_rest = logq.masked_fill(~rest, -1e30).logsumexp(-1)
            value = value + torch.xlogy(tail, tail) - tail * log_rest
        return value.masked_fill(labels == IGNORE_INDEX, 0.0)

    return loss


def assert_no_worse(ours, naive_, true, what, eps):
    """The largest error over the rows is at most the naive one plus a hair of the size of the truth."""
    scale = max(1.0, np.abs(true).max())
    error = np.abs(ours - true).max()
    allowed = np.abs(naive_ - true).max() + eps * scale
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def problem(shape, dtype, kind="normal", seed=0, masked=0.3):
    """Student and teacher logits, labels with some ignored, weights per token."""
    generator = torch.Generator().manual_seed(seed)
    n, v = shape
    student = 3 * torch.randn(n, v, generator=generator)
    teacher = 3 * torch.randn(n, v, generator=generator)
    labels = torch.randint(0, v, (n,), generator=generator)
    top = torch.randint(0, v, (n, 1), generator=generator)
    if kind == "eighty":
        student = 80 * torch.sign(student)
        teacher = 80 * torch.sign(teacher)
    elif kind == "over-confident student":
        student = torch.zeros(n, v).scatter_(1, top, 80.0)
    elif kind == "one-hot teacher":
        teacher = torch.full((n, v), -80.0).scatter_(1, top, 80.0)
    elif kind == "uniform teacher":
        teacher = torch.zeros(n, v)
    elif kind == "equal":
        student = teacher.clone()
    if n > 1:
        labels[torch.rand(n, generator=generator) < masked] = IGNORE_INDEX
    weights = torch.rand(2, n, generator=generator)
    return student.to(dtype), teacher.to(dtype), labels, *weights


def sparse_targets(teacher, slots, temperature, seed=0):
    """Top-k of a teacher, some slots unused (but the first) and repeating a used id."""
    v = teacher.shape[1]
    p = (teacher.double() / temperature).softmax(-1)
    probs, ids = p.topk(min(slots, v), -1)
    unused = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    unused[:, 0] = False
    if slots >= v:
        unused[:] = False
    probs = probs.masked_fill(unused, 0.0)
    ids = torch.where(unused, ids[:, :1], ids)
    order = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(seed))
    ids, probs = ids[:, order].contiguous(), probs[:, order].float().contiguous()
    return ids, probs, (1.0 - probs.double().sum(-1)).clamp(min=0.0).float()


def mixed(ce, kd, ce_weight, kd_weight):
    return ce_weight.double().numpy()[:, None] * ce + kd_weight.double().numpy()[:, None] * kd


def eps_of(dtype):
    return 1e-6 if dtype == torch.float32 else 2**-8


def check_dense(student, teacher, labels, ce_weight, kd_weight, t):
    gradient = student.clone()
    ce, kd, teacher_ce = DENSE(gradient, teacher.clone(), labels, ce_weight, kd_weight, t)
    wide, wide_teacher = student.double().numpy(), teacher.double().numpy()
    true_values = [
        true_ce(wide, labels.numpy()),
        true_dense(wide, wide_teacher, labels.numpy(), t),
        true_ce(wide_teacher, labels.numpy()),
    ]
    naive_values = [
        naive(naive_ce(labels), student.float()),
        naive(naive_dense(teacher, labels, t), student.float()),
        naive(naive_ce(labels), teacher.float()),
    ]
    for what, ours, simple, true in zip(
        ("ce", "kd", "teacher_ce"), (ce, kd, teacher_ce), naive_values, true_values, strict=True
    ):
        assert ours.dtype == torch.float32
        assert_no_worse(ours.double().numpy(), simple[0], true[0], what, 1e-6)
    check_gradient(gradient, naive_values, true_values, ce_weight, kd_weight)
    assert not gradient[labels == IGNORE_INDEX].any()


def check_gradient(gradient, naive_values, true_values, ce_weight, kd_weight):
    expected = mixed(true_values[0][1], true_values[1][1], ce_weight, kd_weight)
    simple = mixed(naive_values[0][1], naive_values[1][1], ce_weight, kd_weight)
    simple = torch.from_numpy(simple).to(gradient.dtype).double().numpy()
    eps = eps_of(gradient.dtype)
    assert_no_worse(gradient.double().numpy(), simple, expected, "gradient", eps)


def check_sparse(student, targets, labels, ce_weight, kd_weight, t, policy):
    gradient = student.clone()
    ce, kd = SPARSE(gradient, *targets, labels, ce_weight, kd_weight, t, policy)
    wide = student.double().numpy()
    arrays = [targets[0].numpy(), *(x.double().numpy() for x in targets[1:])]
    true_values = [true_ce(wide, labels.numpy()), true_sparse(wide, *arrays, labels.numpy(), t, policy)]
    naive_values = [
        naive(naive_ce(labels), student.float()),
        naive(naive_sparse(*targets, labels, t, policy), student.float()),
    ]
    assert_no_worse(ce.double().numpy(), naive_values[0][0], true_values[0][0], "ce", 1e-6)
    assert_no_worse(kd.double().numpy(), naive_values[1][0], true_values[1][0], "kd", 1e-6)
    check_gradient(gradient, naive_values, true_values, ce_weight, kd_weight)
    assert not gradient[labels == IGNORE_INDEX].any()


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, **IDS)
def test_dense(shape, temperature, dtype):
    check_dense(*problem(shape, dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES, **IDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, **IDS)
def test_sparse(shape, temperature, policy, dtype):
    student, teacher, *rest = problem(shape, dtype)
    check_sparse(student, sparse_targets(teacher, 8, temperature), *rest, temperature, policy)


KINDS = ["eighty", "over-confident student", "one-hot teacher", "uniform teacher", "equal"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_with_adversarial_logits(kind, temperature):
    check_dense(*problem(SHAPES[1], torch.float32, kind), temperature)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_with_adversarial_logits(kind, temperature, policy):
    student, teacher, *rest = problem(SHAPES[1], torch.float32, kind)
    check_sparse(student, sparse_targets(teacher, 5, temperature), *rest, temperature, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 2, "all but one", "all"])
def test_any_number_of_kept_entries(slots, policy):
    student, teacher, *rest = problem(SHAPES[1], torch.float32)
    slots = {"all but one": student.shape[1] - 1, "all": student.shape[1]}.get(slots, slots)
    check_sparse(student, sparse_targets(teacher, slots, 1.0), *rest, 1.0, policy)


@pytest.mark.parametrize("tail", [0.0, 1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("kind", ["normal", "over-confident student"])
def test_any_tail_mass(kind, tail):
    student, teacher, *rest = problem(SHAPES[1], torch.float32, kind)
    ids, probs, _ = sparse_targets(teacher, 4, 1.0)
    probs = probs / probs.sum(-1, keepdim=True) * (1 - tail)
    targets = ids, probs, torch.full((len(ids),), tail)
    check_sparse(student, targets, *rest, 1.0, "other_bucket")


def in_other_forms(ids, probs, tail, vocab, seed=0):
    """The same kept entries in four other forms, and rows of which nothing is kept."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(ids.shape[1], generator=g)
    free = torch.stack([torch.tensor(sorted(set(range(vocab)) - set(row.tolist()))[:3]) for row in ids])
    none = torch.zeros(len(ids), 3)
    part = torch.rand(probs.shape, generator=g)
    third = 0.3 * (1 - part)
    silent = probs.clone()
    silent[::2] = 0.0
    return {
        "shuffled": (ids[:, order], probs[:, order], tail),
        "unused slots hold other entries": (torch.cat([free, ids], 1), torch.cat([none, probs], 1), tail),
        "unused slots hold used entries": (torch.cat([ids, ids], 1), torch.cat([0 * probs, probs], 1), tail),
        "mass in several slots": (
            torch.cat([ids, free, ids, ids], 1),
            torch.cat([probs * part, none, probs * third, probs * (1 - part - third)], 1),
            tail,
        ),
        "nothing kept": (ids, silent, tail),
        "nothing kept, no tail": (ids, silent, 0 * tail),
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_entries_in_any_form(policy, temperature):
    student, teacher, labels, *weights = problem(SHAPES[1], torch.float32)
    base = sparse_targets(teacher, 5, temperature)
    whole = student.clone()
    expected = SPARSE(whole, *base, labels, *weights, temperature, policy)
    for form, targets in in_other_forms(*base, student.shape[1]).items():
        check_sparse(student, targets, labels, *weights, temperature, policy)
        if "nothing" in form:
            continue
        gradient = student.clone()
        found = SPARSE(gradient, *targets, labels, *weights, temperature, policy)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("label", ["V", "V + 1", -1, -99, -101])
def test_a_label_outside_the_vocabulary_makes_its_row_nan(label, temperature):
    student, teacher, labels, ce_weight, kd_weight = problem(SHAPES[1], torch.float32, masked=0.0)
    v = student.shape[1]
    wrong = labels.clone()
    wrong[1] = {"V": v, "V + 1": v + 1}.get(label, label)
    others = torch.arange(len(labels)) != 1
    targets = sparse_targets(teacher, 4, temperature)
    wide = torch.cat([student, student], 1)  # in a larger buffer the entry after the row exists
    for ce_weight_C, strided in ((ce_weight, False), (0 * ce_weight, False), (ce_weight, True)):
        weights = ce_weight_C, kd_weight
        for call in (
            lambda s, y, w=weights: DENSE(s, teacher.clone(), y, *w, temperature),
            *(lambda s, y, w=weights, p=p: SPARSE(s, *targets, y, *w, temperature, p) for p in POLICIES),
        ):
            good, bad = student.clone(), (wide.clone()[:, :v] if strided else student.clone())
            expected, found = call(good, labels), call(bad, wrong)
            assert bad[1].isnan().all()
            torch.testing.assert_close(bad[others], good[others])
            for x, y in zip(found, expected, strict=True):
                assert x[1].isnan()
                torch.testing.assert_close(x[others], y[others])


def test_the_teacher_is_left_as_it_is():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher, *rest = problem(SHAPES[1], torch.float32)
        teacher = teacher.to(dtype)
        targets = sparse_targets(teacher, 4, 2.0)
        given = [teacher, *targets, *rest]
        before = [x.clone() for x in given]
        DENSE(student.clone(), teacher, *rest, 2.0)
        SPARSE(student.clone(), *targets, *rest, 2.0, "other_bucket")
        assert all(torch.equal(x, kept) for x, kept in zip(given, before, strict=True))


def test_keeping_every_entry_is_the_dense_loss():
    student, teacher, labels, *weights = problem(SHAPES[1], torch.float32)
    dense, sparse = student.clone(), student.clone()
    kd = DENSE(dense, teacher.clone(), labels, *weights, 1.0)[1]
    for policy in POLICIES:
        sparse = student.clone()
        targets = sparse_targets(teacher, student.shape[1], 1.0)
        kd_sparse = SPARSE(sparse, *targets, labels, *weights, 1.0, policy)[1]
        torch.testing.assert_close(kd_sparse, kd, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")  # the interpreter is numpy
def test_all_ignored_rows_give_zero_even_from_nan():
    student, teacher, labels, *weights = problem(SHAPES[1], torch.float32)
    labels[:] = IGNORE_INDEX
    targets = sparse_targets(teacher, 4, 1.0)
    student[0] = torch.nan
    for t in (1.0, 2.0):
        gradient = student.clone()
        outputs = DENSE(gradient, teacher.clone(), labels, *weights, t)
        assert not any(x.any() for x in (*outputs, gradient))
        for policy in POLICIES:
            gradient = student.clone()
            outputs = SPARSE(gradient, *targets, labels, *weights, t, policy)
            assert not any(x.any() for x in (*outputs, gradient))


def test_a_nan_logit_shows_in_every_output_of_its_row():
    for side in (0, 1):
        inputs = problem(SHAPES[1], torch.float32, masked=0.0)
        inputs[side][0, 1] = torch.nan
        ce, kd, teacher_ce = DENSE(*inputs, 1.0)
        assert kd[0].isnan()
        assert (ce, teacher_ce)[side][0].isnan()
        assert kd[1:].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_masked_with_minus_infinity_counts_for_nothing(temperature):
    student, teacher, labels, *weights = problem(SHAPES[1], torch.float32)
    v = student.shape[1]
    padding = torch.full((len(student), 7), -torch.inf)
    narrow, wide = student.clone(), torch.cat([student, padding], 1)
    expected = DENSE(narrow, teacher.clone(), labels, *weights, temperature)
    found = DENSE(wide, torch.cat([teacher, padding], 1), labels, *weights, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(wide[:, :v], narrow)
    assert not wide[:, v:].any()
    targets = sparse_targets(teacher, 4, temperature)
    narrow, wide = student.clone(), torch.cat([student, padding], 1)
    expected = SPARSE(narrow, *targets, labels, *weights, temperature, "other_bucket")
    found = SPARSE(wide, *targets, labels, *weights, temperature, "other_bucket")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(wide[:, :v], narrow)
    assert not wide[:, v:].any()


def test_rows_of_a_wider_buffer_are_worked_on_where_they_lie():
    student, teacher, labels, *weights = problem(SHAPES[1], torch.float32)
    v = student.shape[1]
    buffer = torch.full((len(student), v + 3), 7.0)
    buffer[:, :v] = student
    ce, _, _ = DENSE(buffer[:, :v], teacher.clone(), labels, *weights, 1.0)
    expected = student.clone()
    torch.testing.assert_close(ce, DENSE(expected, teacher.clone(), labels, *weights, 1.0)[0])
    torch.testing.assert_close(buffer[:, :v].contiguous(), expected)
    assert (buffer[:, v:] == 7.0).all()


def test_unknown_tail_policy_is_named():
    student, teacher, *rest = problem((2, 5), torch.float32)
    with pytest.raises(ValueError, match="tail 'bucket'"):
        SPARSE(student, *sparse_targets(teacher, 2, 1.0), *rest, 1.0, "bucket")


# Faults found in other implementations, each with a test of its own.


def test_the_tail_is_never_nan_as_in_distillkit():
    """DistillKit clamps the student's kept mass at 1 - eps: inf loss and NaN gradient when it is 1."""
    student = torch.tensor([[200.0, 0.0, 0.0, -200.0]])
    for tail in (0.0, 1e-9, 0.4):
        gradient = student.clone()
        targets = torch.tensor([[0, 1]]), torch.tensor([[0.6 - tail, 0.4]]), torch.tensor([tail])
        one = torch.ones(1)
        _, kd = SPARSE(gradient, *targets, torch.tensor([0]), 0 * one, one, 1.0, "other_bucket")
        assert kd.isfinite().all()
        assert gradient.isfinite().all()


def test_the_tail_gradient_is_not_lost_as_in_megatron():
    """Megatron takes 1 - sum, clamped at 1e-8: |g| 0.0038 where 0.5 is right, and too small a loss."""
    student = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5])
    one = torch.ones(1)
    _, kd = SPARSE(student, *targets, torch.tensor([0]), 0 * one, one, 1.0, "other_bucket")
    assert kd.item() == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40 - math.log(3)), rel=1e-6
    )
    assert student[0, 0].item() == pytest.approx(0.5, rel=1e-6)
    assert student[0, 1:].tolist() == pytest.approx([-1 / 6] * 3, rel=1e-6)


def test_a_bucket_far_below_the_smallest_float_is_exact():
    student = torch.tensor([[160.0, 1.0, 0.0, -20.0]])
    targets = torch.tensor([[0, 0]]), torch.tensor([[0.25, 0.0]]), torch.tensor([0.75])
    rest = np.logaddexp.reduce([1.0, 0.0, -20.0])
    one = torch.ones(1)
    _, kd = SPARSE(student, *targets, torch.tensor([0]), 0 * one, one, 1.0, "other_bucket")
    assert kd.item() == pytest.approx(0.25 * math.log(0.25) + 0.75 * (math.log(0.75) + 160 - rest), rel=1e-6)
    conditional = -0.75 * np.exp(np.array([1.0, 0.0, -20.0]) - rest)
    assert student[0].tolist() == pytest.approx([0.75, *conditional], rel=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_t_squared_is_in_value_and_gradient_unlike_axolotl(temperature):
    """Axolotl multiplies the value by T^2 and leaves the gradient: its ratio is T^2, ours 1."""
    student, teacher, labels, *_ = problem(SHAPES[1], torch.float32, masked=0.0)
    targets = sparse_targets(teacher, 4, temperature)
    n = len(student)
    zero, scale = torch.zeros(n), torch.full((n,), temperature**2)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(5))

    def functions(logits):
        dense = DENSE(logits.clone(), teacher.clone(), labels, zero, scale, temperature)[1]
        sparse = SPARSE(logits.clone(), *targets, labels, zero, scale, temperature, "other_bucket")[1]
        return torch.stack([dense, sparse]).double() * temperature**2

    step = 1e-2
    moved = (functions(student + step * direction) - functions(student - step * direction)) / (2 * step)
    dense, sparse = student.clone(), student.clone()
    DENSE(dense, teacher.clone(), labels, zero, scale, temperature)
    SPARSE(sparse, *targets, labels, zero, scale, temperature, "other_bucket")
    written = torch.stack([(dense * direction).sum(-1), (sparse * direction).sum(-1)]).double()
    torch.testing.assert_close(written.sum(-1), moved.sum(-1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_student_is_not_renormalised_over_the_kept_entries_as_in_maxtext(policy):
    """MaxText normalises both sides over the top k: no loss for a student with half its mass elsewhere."""
    student = torch.tensor([[0.3, 0.2, 0.4, 0.1]]).log()
    targets = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), torch.tensor([0.0])
    one = torch.ones(1)
    _, kd = SPARSE(student, *targets, torch.tensor([0]), 0 * one, one, 1.0, policy)
    assert kd.item() == pytest.approx(math.log(2), rel=1e-6)
    assert student[0].tolist() == pytest.approx([-0.3, -0.2, 0.4, 0.1], rel=1e-5)


@torch_only
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("policy", ["dense", *POLICIES])
def test_gradients_by_finite_differences_in_float64(policy, temperature):
    student, teacher, labels, ce_weight, kd_weight = problem((9, 13), torch.float64)
    targets = sparse_targets(teacher, 5, temperature)

    def call(logits):
        if policy == "dense":
            return rows.dense_rows(logits, teacher.clone(), labels, ce_weight, kd_weight, temperature)[:2]
        return rows.sparse_rows(logits, *targets, labels, ce_weight, kd_weight, temperature, policy)

    def loss(logits):
        ce, kd = call(logits.clone())
        assert ce.dtype == torch.float64
        return (ce_weight * ce + kd_weight * kd).sum()

    gradient, step = student.clone(), 1e-5
    call(gradient)
    for n, v in ((n, v) for n in range(9) for v in range(13)):
        bump = torch.zeros_like(student)
        bump[n, v] = step
        difference = (loss(student + bump) - loss(student - bump)) / (2 * step)
        assert gradient[n, v].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-8)


@torch_only
def test_the_result_does_not_depend_on_how_many_rows_are_worked_on_at_a_time(monkeypatch):
    student, teacher, labels, *weights = problem((129, 257), torch.bfloat16)
    targets = sparse_targets(teacher, 6, 2.0)
    found = []
    for entries in (1, 2**20):
        monkeypatch.setattr(rows, "DENSE_ENTRIES", entries)
        monkeypatch.setattr(rows, "SPARSE_ENTRIES", entries)
        dense, sparse = student.clone(), student.clone()
        outputs = rows.dense_rows(dense, teacher.clone(), labels, *weights, 2.0)
        outputs += rows.sparse_rows(sparse, *targets, labels, *weights, 2.0, "other_bucket")
        found.append((*outputs, dense, sparse))
    torch.testing.assert_close(found[0], found[1])


@pytest.fixture
def fresh_choice():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@torch_only
def test_the_choice_is_logged_once(fresh_choice, monkeypatch, caplog):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    student, teacher, *rest = problem((2, 5), torch.float32)
    targets = sparse_targets(teacher, 2, 1.0)
    expected = student.clone()
    rows.dense_rows(expected, teacher.clone(), *rest, 1.0)
    with caplog.at_level(logging.INFO, "tutelage"):
        found = student.clone()
        dispatch.dense_rows(found, teacher.clone(), *rest, 1.0)
        dispatch.sparse_rows(student.clone(), *targets, *rest, 1.0, "none")
    assert torch.equal(found, expected)
    assert [record.message for record in caplog.records] == ["row kernels for cpu tensors: torch"]


@torch_only
def test_the_environment_overrides_the_choice(fresh_choice, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.kernels_for("cuda") == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(UserError, match="TUTELAGE_KERNELS=cuda: must be torch or triton"):
        dispatch.kernels_for("cpu")


@pytest.mark.skipif(not TRITON, reason="about Triton's kernels")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", [None, *POLICIES])
def test_a_gradient_as_two_addends_is_the_gradient(tail, temperature):
    """Each entry is the sum of two of half precision; nothing else changes."""
    for tokens, vocab in SHAPES:
        g = torch.Generator().manual_seed(0)
        student, teacher = (4 * torch.randn(tokens, vocab, generator=g) for _ in range(2))
        labels, weights = torch.randint(0, vocab, (tokens,), generator=g), torch.rand(2, tokens, generator=g)
        labels[0] = IGNORE_INDEX
        if tail is None:
            call, given = DENSE, (teacher, labels, *weights, temperature)
        else:
            top = teacher.softmax(-1).topk(2)
            kept = (top.indices, top.values, 1 - top.values.sum(-1))
            call, given = SPARSE, (*kept, labels, *weights, temperature, tail)
        whole, addends = student.clone(), torch.full((2 * tokens, vocab), math.nan, dtype=torch.bfloat16)
        losses = call(whole, *given)
        assert all(torch.equal(*pair) for pair in zip(losses, call(student, *given, addends), strict=True))
        torch.testing.assert_close(
            addends.double().view(2, tokens, vocab).sum(0), whole.double(), rtol=2.0**-14, atol=1e-6
        )


@torch_only
@needs_triton
def test_cuda_tensors_get_triton(fresh_choice, monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.kernels_for("cuda") == "triton"
    assert dispatch.kernels_for("cpu") == "torch"
    dispatch._choose.cache_clear()
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(UserError, match="cpu tensors need TUTELAGE_KERNELS=torch"):
        dispatch.kernels_for("cpu")
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    dispatch._choose.cache_clear()
    assert dispatch.kernels_for("cuda") == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(UserError, match="triton is not installed"):
        dispatch.kernels_for("mps")


@torch_only
@needs_triton
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("slots", ["i32", 1])
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_here(logits, slots, halved):
    """The interpreter takes more than the compiler does; slots == 1 is a constant to Triton."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    from tutelage.objective.kernels import triton_kernels  # triton exists on Linux only

    common = {
        "student": logits,
        "labels": "*i64",
        "ce_weights": "*fp32",
        "kd_weights": "*fp32",
        "out": "*fp32",
        "addends": "*bf16" if halved else logits,
    }
    common |= dict.fromkeys(("tokens", "vocab", "student_stride", "teacher_stride", "stride"), "i32")
    common |= {"teacher": logits, "kept": logits, "ids": "*i64", "owners": "*i1", "probs": "*fp32"}
    common |= {"tails": "*fp32", "temperature": "fp32", "slots": slots}
    constants = {"HEATED": True, "HALVED": halved, "BUCKET": True, "BLOCK_K": 64, "BLOCK": 1024}
    for kernel in (triton_kernels.dense_kernel.fn, triton_kernels.sparse_kernel.fn):
        known = common | constants
        fixed = {name: known[name] for name in kernel.arg_names if not isinstance(known[name], str)}
        signature = {name: "constexpr" if name in fixed else known[name] for name in kernel.arg_names}
        source = compiler.ASTSource(kernel, signature, constexprs=fixed)
        built = compiler.compile(source, target=target, options={"enable_fp_fusion": True})
        assert built.asm["cubin"]


if TRITON:  # defined only in the process that can run it

    def test_the_triton_kernels_compile_into_one_graph(fresh_choice, monkeypatch):
        monkeypatch.setenv(dispatch.VARIABLE, "triton")
        student, teacher, *rest = (x.to(DEVICE) for x in problem((3, 70), torch.float32))
        targets = [x.to(DEVICE) for x in sparse_targets(teacher.cpu(), 4, 2.0)]

        def both(logits):
            a, b = logits.clone(), logits.clone()
            dense = dispatch.dense_rows(a, teacher, *rest, 2.0)
            sparse = dispatch.sparse_rows(b, *targets, *rest, 2.0, "other_bucket")
            return (*dense, *sparse, a, b)

        dispatch.kernels_for(DEVICE)
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(student), both(student))

    def test_what_the_triton_kernels_cannot_read_is_refused():
        student, teacher, *rest = problem((3, 70), torch.float32)
        with pytest.raises(ValueError, match="student logits with strides"):
            triton_rows.dense_rows(student.T.contiguous().T, teacher, *rest, 1.0)
        with pytest.raises(ValueError, match=r"teacher logits \(3, 69\): must be \(3, 70\)"):
            triton_rows.dense_rows(student, teacher[:, 1:], *rest, 1.0)


@torch_only
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"TRITON_INTERPRET": "1"},
        pytest.param(
            {dispatch.VARIABLE: "triton"},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
    ids=["interpreted", "gpu"],
)
def test_the_triton_kernels_pass_too(setting):
    """A process of its own: triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=os.environ | setting,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
