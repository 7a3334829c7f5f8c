"""bfloat16 and float16 inputs: value and gradients are those of float64 from the same inputs, within 0.3%.

The hard case is a student that nearly agrees with its teacher: the gradient is then the small difference of
two softmaxes, and logits rounded to bfloat16 put it wrong by 8 to 49%.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from divergence_definitions import definition
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tutelage.objective import DIVERGENCES, Objective, TopK, TopP, chunked_objective, reference_objective
from tutelage.objective.chunked import ObjectiveHead
from tutelage.objective.chunks import chunks_of
from tutelage.objective.products import UPCAST_ROWS, HeadProducts, wide_dtype
from tutelage.objective.sparse import most_probable
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, SparseTargets

N, D, V = 40, 128, 32000
DEVICE = "cpu"
LIMIT = 0.003
OVERLAPS = (0.88, 0.95, 0.98)


def near_teacher(overlap, dtype, scale=4.0, common=2.0):
    """Hidden states of student and teacher whose most probable tokens agree this often, and their head.

    The rows of the head have a common part, as those of trained heads have.
    """
    g = torch.Generator().manual_seed(1)
    head = (torch.randn(V, D, generator=g) + common * torch.randn(1, D, generator=g)) / D**0.5
    head, hidden = head.to(dtype), (scale * torch.randn(400, D, generator=g)).to(dtype)
    noise = scale * torch.randn(400, D, generator=g)
    top = (hidden.float() @ head.float().T).argmax(1)
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        taught = (hidden.float() + middle * noise).to(dtype)
        agree = ((taught.float() @ head.float().T).argmax(1) == top).float().mean()
        low, high = (middle, high) if agree > overlap else (low, middle)
    assert abs(agree - overlap) < 0.04
    return hidden[:N], taught[:N], head


@pytest.fixture(scope="module")
def problems():
    return {(overlap, dtype): near_teacher(overlap, dtype) for overlap in OVERLAPS
            for dtype in (torch.bfloat16, torch.float16)}  # fmt: skip


LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
LABELS[::5] = IGNORE_INDEX


def truth(hidden, head, teacher, alpha, objective, sparse=None):
    """Divergence, and gradients of the whole loss, in float64 from the definitions."""
    h, w = (x.double().requires_grad_() for x in (hidden, head))
    keep, t = LABELS != IGNORE_INDEX, objective.temperature
    logits = (h @ w.T)[keep]
    ce = -logits.log_softmax(-1).gather(1, LABELS[keep].unsqueeze(1)).sum()
    q, p = (logits / t).log_softmax(-1), (teacher[keep].double() / t).log_softmax(-1)
    if sparse is not None:
        dense = torch.zeros_like(p).scatter_add(1, sparse.ids_NK[keep], sparse.probs_NK[keep].double())
        kept, tail = dense > 0, sparse.tail_N[keep].double().unsqueeze(1)
        rest = q.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
        q, p = torch.cat([q.masked_fill(~kept, -torch.inf), rest], 1), torch.cat([dense, tail], 1).log()
    kd = t * t * definition(objective.divergence, q, p, objective).sum()
    ((1 - alpha) * ce + alpha * kd).backward()
    return kd.detach(), h.grad, w.grad


def found(function, hidden, head, targets, alpha, objective):
    h, w = (x.clone().to(DEVICE).requires_grad_() for x in (hidden, head))
    given = {field.name: getattr(targets, field.name) for field in dataclasses.fields(targets)}
    moved = {name: x.to(DEVICE) for name, x in given.items() if isinstance(x, torch.Tensor)}
    sums = function(h, w, LABELS.to(DEVICE), dataclasses.replace(targets, **moved), alpha, objective)
    sums.loss.backward()
    assert (h.grad.dtype, w.grad.dtype) == (hidden.dtype, head.dtype)
    return sums.kd.cpu(), h.grad.cpu(), w.grad.cpu()


def assert_near(measured, expected, arithmetic="as here"):
    for mine, true in zip(measured, expected, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) <= LIMIT, arithmetic


def logits_of(taught, head):
    return taught.double() @ head.double().T


ARITHMETICS = ("as here", "as on cuda", *(("on a gpu",) if torch.cuda.is_available() else ()))
"""The products of this machine, those of CUDA with its roundings by way of float32, and a GPU's own."""


def as_on_cuda(hidden_ND, weight_VD):
    half = hidden_ND.dtype
    return HeadProducts(weight_VD.to(half), wide_dtype(hidden_ND), half)


@pytest.fixture
def arithmetics(monkeypatch):
    """Compute in each arithmetic in turn, so that one float64 truth serves all of them."""

    def each():
        for arithmetic in ARITHMETICS:
            with monkeypatch.context() as patch:
                if arithmetic == "on a gpu":
                    patch.setattr(sys.modules[__name__], "DEVICE", "cuda")
                if arithmetic == "as on cuda":
                    patch.setattr(HeadProducts, "of", as_on_cuda)
                yield arithmetic

    return each


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_targets(problems, divergence, overlap, arithmetics):
    for dtype in (torch.bfloat16, torch.float16):
        hidden, taught, head = problems[overlap, dtype]
        teacher = logits_of(taught, head)
        for alpha, temperature in ((1.0, 1.0), (0.4, 2.0)):
            objective = Objective(divergence=divergence, temperature=temperature, chunk_tokens=16)
            expected = truth(hidden, head, teacher, alpha, objective)
            given = hidden, head, DenseTargets(taught, head), alpha, objective
            assert_near(found(reference_objective, *given), expected)
            for arithmetic in arithmetics():
                assert_near(found(chunked_objective, *given), expected, arithmetic)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_kl", "tvd"])
def test_sparse_targets(problems, divergence, overlap, arithmetics):
    hidden, taught, head = problems[overlap, torch.bfloat16]
    teacher = logits_of(taught, head)
    top = teacher.softmax(-1).topk(64)
    kept = SparseTargets(top.indices, top.values.float(), (1 - top.values.sum(-1)).float(), torch.zeros(N))
    objective = Objective(divergence=divergence, chunk_tokens=16)
    expected = truth(hidden, head, teacher, 1.0, objective, kept)
    for arithmetic in arithmetics():
        measured = found(chunked_objective, hidden, head, kept, 1.0, objective)
        assert_near(measured, expected, arithmetic)


@pytest.mark.parametrize(
    ("truncation", "k", "p"), [(TopK(k=20), 20, 1.0), (TopP(p=0.95), None, 0.95)], ids=str
)
def test_truncated_targets(problems, truncation, k, p, arithmetics):
    hidden, taught, head = problems[0.98, torch.bfloat16]
    teacher = logits_of(taught, head)
    ids, logp = most_probable(teacher.log_softmax(-1), k, p)
    probs = logp.exp()
    kept = SparseTargets(ids, probs, 1 - probs.sum(-1), torch.zeros(N))
    objective = Objective(truncation=truncation, chunk_tokens=16)
    expected = truth(hidden, head, teacher, 1.0, objective, kept)
    for arithmetic in arithmetics():
        measured = found(chunked_objective, hidden, head, DenseTargets(taught, head), 1.0, objective)
        assert_near(measured, expected, arithmetic)


def test_sampled_targets(problems, arithmetics):
    hidden, taught, head = problems[0.95, torch.bfloat16]
    teacher = logits_of(taught, head)
    ids = torch.multinomial(
        teacher.softmax(-1), 50, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    kept = SparseTargets(ids, torch.full((N, 50), 0.02), torch.zeros(N), torch.zeros(N))  # repeated as drawn
    objective = Objective(tail="none", chunk_tokens=16)
    expected = truth(hidden, head, teacher, 1.0, objective, kept)
    for arithmetic in arithmetics():
        measured = found(chunked_objective, hidden, head, kept, 1.0, objective)
        assert_near(measured, expected, arithmetic)


@pytest.mark.parametrize("scale", [12.0, 40.0])
def test_over_confident_models(scale, arithmetics):
    hidden, taught, head = near_teacher(0.98, torch.bfloat16, scale)
    teacher = logits_of(taught, head)
    assert teacher.abs().max() > 20 * scale / 12
    for divergence in DIVERGENCES:
        objective = Objective(divergence=divergence, chunk_tokens=16)
        expected = truth(hidden, head, teacher, 0.5, objective)
        for arithmetic in arithmetics():
            measured = found(chunked_objective, hidden, head, DenseTargets(taught, head), 0.5, objective)
            assert_near(measured, expected, arithmetic)


def test_a_float32_head_is_used_as_it_is_under_and_outside_autocast(problems):
    hidden, taught, head = problems[0.95, torch.bfloat16]
    head = head.float() * 1.0009765  # no bfloat16 numbers
    teacher = logits_of(taught, head)
    targets, objective = DenseTargets(taught, head), Objective(chunk_tokens=16)
    expected = truth(hidden, head, teacher, 0.5, objective)
    outside = found(chunked_objective, hidden, head, targets, 0.5, objective)
    assert_near(outside, expected)
    for function in (chunked_objective, reference_objective):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = function(h, w, LABELS, targets, 0.5, objective)
            wide = function(hidden.float(), head, LABELS, targets, 0.5, objective)
        sums.loss.backward()
        assert_near((sums.kd, h.grad, w.grad), expected)
        torch.testing.assert_close(wide.kd, sums.kd, rtol=1e-4, atol=0)


def test_teacher_logits_of_half_precision_are_taken_as_given(problems):
    hidden, taught, head = problems[0.88, torch.bfloat16]
    teacher = logits_of(taught, head).bfloat16()
    expected = truth(hidden, head, teacher, 1.0, Objective())
    assert_near(found(chunked_objective, hidden, head, LogitTargets(teacher), 1.0, Objective()), expected)


def test_objective_head_in_half_precision(problems):
    hidden, taught, head = problems[0.98, torch.bfloat16]
    expected = truth(hidden, head, logits_of(taught, head), 1.0, Objective())
    module = ObjectiveHead(nn.Linear(D, V, bias=False).bfloat16(), Objective())
    with torch.no_grad():
        module.head.weight.copy_(head)
    h = hidden.clone().requires_grad_()
    loss, _, kd, *_ = module(h, LABELS, DenseTargets(taught, head), 1.0)
    loss.backward()
    assert_near((kd, h.grad, module.head.weight.grad), expected)


def test_products_of_any_shape_and_dtype():
    g = torch.Generator().manual_seed(0)
    for rows in (1, UPCAST_ROWS - 1, UPCAST_ROWS, 2 * UPCAST_ROWS + 3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            hidden, weight = (
                torch.randn(5, 7, generator=g).to(dtype),
                torch.randn(rows, 7, generator=g).to(dtype),
            )
            gradient = torch.randn(5, rows, generator=g).to(wide_dtype(hidden))
            products = [HeadProducts.of(hidden, weight)]
            if dtype in (torch.bfloat16, torch.float16):
                products.append(HeadProducts(weight, torch.float32, dtype))
            for head in products:
                d_weight = torch.ones(rows, 7, dtype=head.dtype)
                head.add_to_weight(d_weight, head.rounded(gradient), hidden)
                wide = [x.double() for x in (hidden, weight, gradient)]
                for mine, true in (
                    (head.logits(hidden), wide[0] @ wide[1].T),
                    (head.to_hidden(head.rounded(gradient)), wide[2] @ wide[1]),
                    (d_weight, 1 + wide[2].T @ wide[0]),
                ):
                    assert mine.dtype == head.dtype
                    rounding = 3e-4 if head.half == torch.float16 else 2e-5
                    assert float((mine.double() - true).norm() / true.norm()) < rounding


def test_a_sum_of_half_products_can_be_traced():
    """As torch.compile and memory trackers do; torch itself cannot trace `addmm` with `out_dtype`."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 7, dtype=torch.bfloat16) for rows in (5, 9))
        head, d_weight = HeadProducts(weight, torch.float32, torch.bfloat16), torch.empty(9, 7)
        gradient = head.rounded(torch.empty(5, 9))
        head.add_to_weight(d_weight, gradient, hidden)
        assert head.to_hidden(gradient).shape == hidden.shape


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1.0, 1e4])
def test_a_gradient_of_any_size_survives_half_precision(size):
    """float16 has nothing below 6e-8 and nothing above 65,504."""
    g = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(300, 16, generator=g), size * torch.randn(6, 300, generator=g)
    for dtype in (torch.bfloat16, torch.float16):
        head = HeadProducts(weight.to(dtype), torch.float32, dtype)
        true = gradient.double() @ weight.to(dtype).double()
        assert float((head.to_hidden(head.rounded(gradient)).double() - true).norm() / true.norm()) < 1e-3
        assert not head.to_hidden(head.rounded(torch.zeros_like(gradient))).any()


@pytest.mark.parametrize("kind", ["none", "logits", "hidden", "sparse"])
@pytest.mark.parametrize("kept", [0.0, 0.2, 1.0])
def test_only_tokens_with_a_label_are_multiplied(monkeypatch, kind, kept):
    g = torch.Generator().manual_seed(0)
    n, vocab = 100, 60
    hidden, weight, teacher = (torch.randn(*s, generator=g) for s in ((n, 8), (vocab, 8), (n, vocab)))
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[torch.randperm(n, generator=g)[int(kept * n) :]] = IGNORE_INDEX
    top = teacher.softmax(-1).topk(5)
    targets = {
        "none": None,
        "logits": LogitTargets(teacher),
        "hidden": DenseTargets(torch.randn(n, 4, generator=g), torch.randn(vocab, 4, generator=g)),
        "sparse": SparseTargets(top.indices, top.values, 1 - top.values.sum(-1), torch.zeros(n)),
    }[kind]
    asked = []
    logits = HeadProducts.logits
    monkeypatch.setattr(HeadProducts, "logits", lambda self, h: (asked.append(h.shape), logits(self, h))[1])
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    alpha = 0.0 if targets is None else 0.4
    sums = chunked_objective(h, w, labels, targets, alpha, Objective(chunk_tokens=7))
    sums.loss.backward()
    count = int(kept * n)
    assert sum(rows for rows, width in asked if width == 8) == count
    assert sum(rows for rows, width in asked if width == 4) == (count if kind == "hidden" else 0)
    assert not h.grad[labels == IGNORE_INDEX].any()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    same = reference_objective(h2, w2, labels, targets, alpha, Objective())
    same.loss.backward()
    torch.testing.assert_close((h.grad, w.grad, sums.loss, sums.kd), (h2.grad, w2.grad, same.loss, same.kd))


def test_what_a_ignored_token_holds_does_not_matter():
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*s, generator=g) for s in ((9, 4), (11, 4), (9, 11)))
    labels = torch.tensor([1, IGNORE_INDEX, 2, 3, IGNORE_INDEX, 4, 5, 6, IGNORE_INDEX])
    values = []
    for other in (False, True):
        h, t = hidden.clone(), teacher.clone()
        if other:
            h[1], t[4] = 1e30, -1e30
        values.append(chunked_objective(h, weight, labels, LogitTargets(t), 0.5, Objective()).loss)
    assert values[0] == values[1]


def test_chunks_of_a_whole_batch_are_slices():
    """Where nothing is ignored nothing is copied."""
    rows = list(chunks_of(torch.tensor([3, 4, 5]), 2))
    assert rows == [slice(0, 2), slice(2, 4)]
    some = list(chunks_of(torch.tensor([3, IGNORE_INDEX, 5]), 1))
    assert [x.tolist() for x in some] == [[0], [2]]
    none = list(chunks_of(torch.full((3,), IGNORE_INDEX), 2))
    assert [x.tolist() for x in none] == [[]]  # for the gates, whose counts every rank sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_without_any_label_has_no_gradient(arithmetics, dtype):
    """A micro-batch of prompts: nothing is multiplied, and the gradients are there, as zeros."""
    for arithmetic in arithmetics():
        labels = torch.full((5,), IGNORE_INDEX, device=DEVICE)
        for vocab_size in (None, 7):
            h, w = (torch.ones(*s, dtype=dtype, device=DEVICE, requires_grad=True) for s in ((5, 4), (9, 4)))
            targets = DenseTargets(torch.ones(5, 3, dtype=dtype, device=DEVICE), w[:, :3].detach())
            sums = chunked_objective(h, w, labels, targets, 0.4, Objective(), vocab_size=vocab_size)
            sums.loss.backward()
            assert float(sums.loss.detach()) == 0.0, arithmetic
            assert not h.grad.any(), arithmetic
            assert not w.grad.any(), arithmetic
