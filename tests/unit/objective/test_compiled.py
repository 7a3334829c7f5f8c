"""torch.compile(fullgraph=True) takes the objective whole, and the result is that without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tutelage.config.objective_config import ObjectiveConfig, TeacherBetterGate
from tutelage.objective import Objective, ObjectiveHead, TopK, chunked_objective, make_gate
from tutelage.types import DenseTargets, LogitTargets, LogitTransform, SparseTargets

N, D, E, V = 23, 8, 6, 41
G = torch.Generator().manual_seed(0)
WEIGHT, BIAS, HEAD = (torch.randn(*shape, generator=G) for shape in ((V, D), (V,), (V, E)))
LABELS, TOKEN_WEIGHTS = torch.randint(0, V, (N,), generator=G), torch.rand(N, generator=G)
LABELS[::4] = -100
HIDDEN, TAUGHT = torch.randn(N, D, generator=G), torch.randn(N, E, generator=G)
WEIGHT.requires_grad_()
BIAS.requires_grad_()
PLAIN = Objective(chunk_tokens=5)
ALL = Objective(temperature=2.0, label_smoothing=0.1, z_loss=1e-3, truncation=TopK(k=3))
MODULE = ObjectiveHead(nn.Linear(D, V), ALL)


def dense(hidden, taught, alpha, objective):
    targets = DenseTargets(taught, HEAD, transform=LogitTransform(0.5, 30.0))
    more = {"transform": LogitTransform(2.0, 20.0), "vocab_size": V - 1, "per_token": True}
    labels = LABELS.clamp(max=V - 2)
    return chunked_objective(
        hidden * 2,
        WEIGHT,
        labels,
        targets,
        alpha,
        objective,
        None,
        BIAS,
        token_weights_N=TOKEN_WEIGHTS,
        **more,
    )


def sparse(hidden, taught, alpha, objective):
    probs, ids = (taught @ HEAD.T).softmax(-1).topk(5)
    targets = SparseTargets(ids, probs, 1 - probs.sum(-1), probs[:, 0].log())
    return chunked_objective(hidden * 2, WEIGHT, LABELS, targets, alpha, PLAIN)


def logits(hidden, taught, alpha, objective):
    return chunked_objective(hidden * 2, WEIGHT, LABELS, LogitTargets(taught @ HEAD.T), alpha, objective)


def module(hidden, taught, alpha, objective):
    return MODULE(hidden * 2, LABELS, DenseTargets(taught, HEAD), alpha)


def no_teacher(hidden, taught, alpha, objective):
    return chunked_objective(hidden * 2, WEIGHT, LABELS, None, 0.0, objective)


def answers(function, alpha, objective):
    hidden, leaves = HIDDEN.clone().requires_grad_(), [WEIGHT, BIAS, *MODULE.parameters()]
    for leaf in leaves:
        leaf.grad = None
    sums = function(hidden, TAUGHT, alpha, objective)
    loss, ce, kd = sums[:3] if isinstance(sums, tuple) else (sums.loss, sums.ce, sums.kd)
    (loss / 3).backward()
    assert not ce.requires_grad
    assert not kd.requires_grad
    each = (
        [] if isinstance(sums, tuple) or sums.tokens is None else [sums.tokens.entropy_N, sums.tokens.loss_N]
    )
    return [loss, ce, kd, hidden.grad, *each, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(function, backend, calls):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for alpha, objective in calls:
        mine, plain = (answers(one, alpha, objective) for one in (compiled, function))
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("function", [sparse, logits, module, no_teacher])
def test_traced_whole(function):
    assert_same(function, "aot_eager", [(0.4, PLAIN)])


def test_any_alpha_and_any_objective_are_the_ones_given():
    """Alpha changes at every step, and must not be compiled in; another objective must not be mistaken."""
    calls = [(alpha, objective) for objective in (ALL, PLAIN) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)]
    with torch._dynamo.config.patch(recompile_limit=4):
        assert_same(dense, "aot_eager", calls)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # inductor's own
def test_by_the_default_compiler():
    assert_same(dense, "inductor", [(0.4, ALL), (0.7, ALL)])


def test_a_gate_is_refused_where_it_would_count_wrongly():
    gate = make_gate(TeacherBetterGate(kind="teacher_better"))

    def gated(hidden):
        return chunked_objective(hidden, WEIGHT, LABELS, LogitTargets(TAUGHT @ HEAD.T), 0.4, PLAIN, gate).loss

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"gate: it counts tokens in Python"):
        torch.compile(gated, fullgraph=True, backend="eager")(HIDDEN)


@pytest.mark.parametrize("transposed", [(True, False), (False, True)])
def test_gradients_have_the_strides_that_the_compiler_is_told(transposed):
    """Inductor ends with an AssertionError where they differ: a head that is another layer's transpose."""
    hidden, weight = (
        x.detach().T.contiguous().T if turned else x.detach()
        for x, turned in zip((HIDDEN, WEIGHT), transposed, strict=True)
    )
    args = [hidden, weight, None, LABELS, None, [TAUGHT @ HEAD.T], "logits", 1.0, [1.0, 1.0], None, None]
    alpha = torch.tensor(0.4, dtype=torch.float64)
    args += [PLAIN.model_dump_json(), alpha, None, False, [True, True, False]]
    operator = torch.ops.tutelage.chunked_objective.default
    with FakeTensorMode(allow_non_fake_inputs=True):
        told = operator(*args)
    assert [x.stride() for x in told] == [x.stride() for x in operator(*args)]


def test_a_sum_can_be_changed_in_place():
    def mean(hidden):
        loss = chunked_objective(hidden, WEIGHT, LABELS, LogitTargets(TAUGHT @ HEAD.T), 0.4, PLAIN).loss
        loss /= N
        return loss

    torch._dynamo.reset()
    found = torch.compile(mean, fullgraph=True, backend="eager")(HIDDEN)
    torch.testing.assert_close(found, mean(HIDDEN))


def test_the_objective_of_a_run_is_taken():
    of_run = ObjectiveConfig(temperature=2.0, alpha="auto")

    def loss(hidden):
        return chunked_objective(hidden, WEIGHT, LABELS, LogitTargets(TAUGHT @ HEAD.T), 0.4, of_run).loss

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(HIDDEN), loss(HIDDEN))


def test_a_second_derivative_is_refused():
    def loss(hidden):
        return chunked_objective(hidden, WEIGHT, LABELS, None, 0.0, PLAIN).loss

    torch._dynamo.reset()
    hidden = HIDDEN.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(hidden)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(compiled, hidden, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, of its forward mode
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # likewise, from Python 3.14 on
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("given", ["hidden", "weight"])
def test_forward_mode_is_refused(compiled, given):
    """Compiled, the derivative was 0: that is what torch takes for it of an operator that is not its own."""
    inputs = {"hidden": HIDDEN.detach(), "weight": WEIGHT.detach()}

    def loss(changed):
        both = inputs | {given: changed}
        return chunked_objective(both["hidden"], both["weight"], LABELS, None, 0.0, PLAIN).loss

    def derivative(changed):
        return torch.func.jvp(loss, (changed,), (torch.ones_like(changed),))

    torch._dynamo.reset()
    function = torch.compile(derivative, fullgraph=True, backend="eager") if compiled else derivative
    with pytest.raises(Exception, match=r"forward mode.*the objective has a backward pass alone"):
        function(inputs[given])
