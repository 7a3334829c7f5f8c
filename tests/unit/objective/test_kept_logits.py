"""The logits of all chunks of a call share memory; calls, threads and inputs share nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.objective import Objective, chunked_objective, reference_objective
from tutelage.objective.kernels import rows
from tutelage.objective.products import HeadProducts
from tutelage.types import PLAIN, DenseTargets, LogitTransform

N, D, E, V, CHUNK = 50, 6, 7, 5000, 16
TRANSFORMED = LogitTransform(0.5, 20.0)


def problem(seed, dtype=torch.float32, transform=TRANSFORMED):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, teacher, head = (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((N, D), (V, D), (N, E), (V, E))
    )
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels, DenseTargets(teacher, head, transform)


def forward(hidden, weight, labels, targets, function=chunked_objective):
    objective = Objective(chunk_tokens=CHUNK)
    return function(hidden, weight, labels, targets, 0.4, objective, transform=targets.transform).loss


def answers(seed, dtype=torch.float32, function=chunked_objective):
    given = problem(seed, dtype)
    loss = forward(*given, function)
    loss.backward()
    return loss.detach(), given[0].grad, given[1].grad


class LogitMemory(TorchDispatchMode):
    """Notes every piece of memory that holds the logits of a chunk, or more."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[1:] == (V,) and len(result) >= CHUNK // 2:
            self.held[result.untyped_storage().data_ptr()] = result  # held, so that no address comes twice
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_call_has_one_piece_of_memory_for_the_logits_of_each_side(dtype, monkeypatch):
    monkeypatch.setattr(rows, "DENSE_ENTRIES", V)  # a row at a time, so that the temporaries are small
    given = problem(0, dtype, PLAIN)
    with LogitMemory() as memory:
        forward(*given)
    assert len(memory.held) == 2  # three chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_calls_that_are_alive_at_once_do_not_meet(dtype):
    alone = [answers(seed, dtype) for seed in (1, 2)]
    first, second = problem(1, dtype), problem(2, dtype)
    losses = forward(*first), forward(*second)
    for given, loss, expected in zip((first, second), losses, alone, strict=True):
        loss.backward()
        for found, true in zip((loss.detach(), given[0].grad, given[1].grad), expected, strict=True):
            assert torch.equal(found, true)


def test_threads_do_not_meet():
    seeds = range(6)
    alone = [answers(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        for _ in range(3):
            for found, true in zip(pool.map(answers, seeds), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_result_is_that_of_the_reference(dtype):
    torch.testing.assert_close(answers(3, dtype), answers(3, dtype, reference_objective))


def test_products_on_their_own_give_new_memory():
    """Those of a teacher that is evaluated or cached are kept by their callers."""
    hidden, weight, *_ = problem(4)
    head = HeadProducts.of(hidden, weight)
    first, kept = head.logits(hidden), head.keeping_logits(N)
    again = kept.logits(hidden)
    assert torch.equal(first, again)
    assert kept.logits(hidden[:3]).data_ptr() == again.data_ptr() != first.data_ptr()
    assert head.logits(hidden).data_ptr() != first.data_ptr()
