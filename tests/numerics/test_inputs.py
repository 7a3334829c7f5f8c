"""What the objective is given: never changed, equal in every form, and refused where it is wrong."""

from __future__ import annotations

import dataclasses
import itertools
from operator import attrgetter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from tutelage.objective import DIVERGENCES, Objective, TopK, TopP, chunked_objective, reference_objective
from tutelage.objective.chunked import ObjectiveHead
from tutelage.objective.products import weight_and_bias
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, LogitTransform, SparseTargets

N, D, E, V = 23, 8, 6, 41
FUNCTIONS = (chunked_objective, reference_objective)


def problem(dtype=torch.float32, masked=0.3, seed=0, n=N):
    """Hidden states, head, labels with some ignored, and the teacher's logits."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, D, generator=g), torch.randn(V, D, generator=g)
    labels = torch.randint(0, V, (n,), generator=g)
    labels[torch.rand(n, generator=g) < masked] = IGNORE_INDEX
    return hidden.to(dtype), weight.to(dtype), labels, torch.randn(n, V, generator=g)


def targets_of(kind, logits, dtype=torch.float32):
    """The same teacher in every form in which it can be given."""
    if kind == "logits":
        return LogitTargets(logits.to(dtype))
    if kind == "hidden":
        return DenseTargets(logits[:, :E].to(dtype), logits.T[:, :E].contiguous().to(dtype))
    if kind == "hidden with bias":
        return DenseTargets(logits[:, :E].to(dtype), logits.T[:, :E].contiguous().to(dtype), bias_V=logits[0])
    probs, ids = logits.softmax(-1).topk(7)
    tail = (1 - probs.sum(-1)).clamp(min=0)
    if kind == "sampled":
        probs, tail = torch.full_like(probs, 1 / 7), tail * 0
    if kind == "padded":  # a slot without mass that repeats nothing
        probs = probs.clone()
        tail, probs[:, 3] = tail + probs[:, 3], 0.0
    return SparseTargets(ids, probs, tail, logits.log_softmax(-1)[:, 0].contiguous())


KINDS = ("logits", "hidden", "hidden with bias", "top-k", "sampled", "padded")


def tensors_of(targets):
    values = (attrgetter(field.name)(targets) for field in dataclasses.fields(targets))
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_never_change_and_targets_can_be_used_again(kind, dtype):
    hidden, weight, labels, logits = problem(dtype)
    bias = logits[1].to(dtype)
    targets = targets_of(kind, logits, dtype)
    inputs = [hidden, weight, labels, bias, *tensors_of(targets)]
    before = [x.clone() for x in inputs]
    settings = [
        *(Objective(divergence=name, temperature=t) for name in DIVERGENCES for t in (1.0, 2.0)),
        Objective(divergence="hard_labels"),
        Objective(tail="renormalise"),
        Objective(tail="none"),
    ]
    if kind == "sampled":  # which reverse KL is refused for
        settings = [one for one in settings if one.divergence != "reverse_kl"]
    if not isinstance(targets, SparseTargets):
        settings += [Objective(truncation=TopK(k=5)), Objective(truncation=TopP(p=0.9))]
    padded = {"vocab_size": V, "transform": LogitTransform(0.5, 30.0)}
    cases = [*((one, {}) for one in settings), (Objective(), padded)]
    for (objective, head), size, function, grad in itertools.product(
        cases, (4, 100), FUNCTIONS, (True, False)
    ):
        if isinstance(targets, SparseTargets):
            targets = SparseTargets(*tensors_of(targets), objective.temperature)
        values = []
        for _ in range(2):
            h, w, b = (x.clone().requires_grad_(grad) for x in (hidden, weight, bias))
            if not grad:
                h, w, b = hidden, weight, bias
            chunked = objective.model_copy(update={"chunk_tokens": size})
            sums = function(h, w, labels, targets, 0.5, chunked, None, b, **head)
            if grad:
                sums.loss.backward()
            values.append(
                torch.stack([sums.loss.detach(), sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha])
            )
        assert torch.equal(values[0], values[1])
        for x, kept in zip(inputs, before, strict=True):
            assert torch.equal(x, kept)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_not_frozen_gets_no_gradient(kind, function):
    hidden, weight, labels, logits = problem()
    targets = targets_of(kind, logits)
    floats = [tensor.requires_grad_() for tensor in tensors_of(targets) if tensor.is_floating_point()]
    objective = Objective(tail="none" if kind == "sampled" else "other_bucket")
    function(hidden, weight.requires_grad_(), labels, targets, 0.5, objective).loss.backward()
    assert weight.grad is not None
    assert [tensor.grad for tensor in floats] == [None] * len(floats)


def test_every_sum_can_be_changed_in_place():
    hidden, weight, labels, logits = problem()
    for function, targets in itertools.product(FUNCTIONS, (None, LogitTargets(logits))):
        h = hidden.clone().requires_grad_()
        alpha = 0.0 if targets is None else 0.4
        sums = function(h, weight, labels, targets, alpha, Objective())
        before = [x.clone() for x in (sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha)]
        loss = sums.loss
        loss /= 4
        loss.mul_(2).add_(1)
        sums.ce.div_(2)
        sums.kd.add_(3)
        sums.teacher_ce.mul_(0)
        sums.effective_alpha.sub_(1)
        loss.backward()
        plain = hidden.clone().requires_grad_()
        (function(plain, weight, labels, targets, alpha, Objective()).loss / 2).backward()
        torch.testing.assert_close(h.grad, plain.grad)
        after = [before[0] / 2 + 1, before[1] / 2, before[2] + 3, before[3] * 0, before[4] - 1]
        found = (sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha)
        for x, y in zip(found, after, strict=True):
            torch.testing.assert_close(x, y)
    sums = ObjectiveHead(nn.Linear(D, V), Objective())(hidden, labels, LogitTargets(logits), 0.4)
    for x in sums:
        x.mul_(2)


@pytest.mark.parametrize("label", [V, V + 5, -1, -99, 2**40])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_label_outside_the_vocabulary_is_refused(function, label):
    hidden, weight, labels, logits = problem()
    labels[5] = label
    for targets in (None, LogitTargets(logits), targets_of("top-k", logits)):
        with pytest.raises(ValueError, match=f"labels: {label} is outside the vocabulary of {V}"):
            function(hidden, weight, labels, targets, 0.0, Objective())
    padded = torch.cat([weight, weight[:7]])
    labels[5] = V
    with pytest.raises(ValueError, match="labels: 41 is outside the vocabulary of 41"):
        function(hidden, padded, labels, None, 0.0, Objective(), vocab_size=V)


NUMBERS = [
    *({"chunk_tokens": x} for x in (0, -3, 2.5, True)),
    *({"temperature": x} for x in (0.0, -1.0, 1e-45, 1e-30, 1e6, float("inf"), float("nan"))),
    *({field: x} for field in ("jsd_beta", "skew") for x in (0.0, 1.0, -0.1, 1.5, float("nan"))),
]


@pytest.mark.parametrize("settings", NUMBERS, ids=str)
def test_numbers_that_mean_nothing_are_refused(settings):
    (field,) = settings
    with pytest.raises(ValueError, match=f"{field} = "):
        Objective(**settings)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vocabulary_sizes_that_mean_nothing_are_refused(function, size):
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match=f"vocab_size {size}: must be a whole number from 1"):
        function(hidden, weight, labels, None, 0.0, Objective(), vocab_size=size)


def test_numbers_of_truncations_and_transforms_are_checked():
    for k in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="k = "):
            TopK(k=k)
    for p in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="p = "):
            TopP(p=p)
    for value in (None, "2", torch.tensor(2.0)):  # of a learned scale there would be no gradient
        with pytest.raises(ValueError, match="scale"):
            LogitTransform(value)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            LogitTransform(value)
        with pytest.raises(ValueError, match="softcap"):
            LogitTransform(1.0, value)
    hidden, weight, labels, logits = problem()
    for function, alpha in itertools.product(FUNCTIONS, (-0.1, 1.1, float("nan"), float("inf"))):
        with pytest.raises(ValueError, match="alpha"):
            function(hidden, weight, labels, LogitTargets(logits), alpha, Objective())


@pytest.mark.parametrize("shape", [(V + 1,), (V - 1,), (V, 1), (1,)])
def test_a_bias_of_another_shape_is_refused(shape):
    hidden, weight, labels, logits = problem()
    bad, nan = torch.zeros(shape), torch.zeros(V).index_fill_(0, torch.tensor(2), torch.nan)
    targets = DenseTargets(logits[:, :E], logits.T[:, :E], bias_V=bad)
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=f"bias .*: must be \\[{V}\\]"):
            function(hidden, weight, labels, None, 0.0, Objective(), None, bad)
        with pytest.raises(ValueError, match=f"targets.bias .*: must be \\[{V}\\]"):
            function(hidden, weight, labels, targets, 0.5, Objective())
        with pytest.raises(ValueError, match="bias: has 1 values that are NaN"):
            function(hidden, weight, labels, None, 0.0, Objective(), None, nan)


def as_column(hidden, weight, bias):
    """A head's bias is one more column, and one more hidden entry that is always 1."""
    return torch.cat([hidden, torch.ones(len(hidden), 1)], 1), torch.cat([weight, bias.unsqueeze(1)], 1)


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "hard_labels"])
def test_a_bias_is_one_more_column_of_the_head(divergence):
    hidden, weight, labels, logits = problem()
    bias = logits[2]
    teacher = DenseTargets(logits[:, :E], logits.T[:, :E], bias_V=logits[3])
    widened = DenseTargets(*as_column(logits[:, :E], logits.T[:, :E], logits[3]))
    for function, sparse in itertools.product(FUNCTIONS, (False, True)):
        temperature = 1.0 if sparse else 2.0
        objective = Objective(divergence=divergence, temperature=temperature, chunk_tokens=5)
        size = {"vocab_size": V - 4}
        labels_, kept = labels.clamp(max=V - 5), targets_of("top-k", logits[:, : V - 4])
        given = (kept, kept) if sparse else (teacher, widened)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        function(*leaves[:2], labels_, given[0], 0.4, objective, None, leaves[2], **size).loss.backward()
        wide = [x.clone().requires_grad_() for x in as_column(hidden, weight, bias)]
        function(*wide, labels_, given[1], 0.4, objective, **size).loss.backward()
        torch.testing.assert_close(leaves[0].grad, wide[0].grad[:, :D])
        torch.testing.assert_close(leaves[1].grad, wide[1].grad[:, :D])
        torch.testing.assert_close(leaves[2].grad, wide[1].grad[:, D])
        assert leaves[2].grad.abs().sum() > 0
        assert not leaves[2].grad[V - 4 :].any()


class Adapted(nn.Module):
    """What peft puts in the place of a linear layer: its weight is there, but is not all that it computes."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(D, 2, bias=False)
        self.lora_B = nn.Linear(2, V, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_is_more_than_its_weight_is_refused():
    plain = nn.Linear(D, V)
    assert weight_and_bias(plain) == (plain.weight, plain.bias)
    assert weight_and_bias(nn.Linear(D, V, bias=False))[1] is None
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    others = nn.Sequential(plain), nn.Embedding(V, D), None, plain.weight
    for head in (Adapted(plain), Scaled(D, V), normed, *others):
        for use in (weight_and_bias, lambda head: ObjectiveHead(head, Objective())):
            with pytest.raises(ValueError, match=r"head .*: must be a linear layer and no more; merge"):
                use(head)


def test_a_head_whose_tensors_are_no_parameters_is_given_whole():
    """FSDP puts tensors there while it computes; a frozen bias may be a buffer, which was left out."""
    head = nn.Linear(D, V)
    weight, bias = head.weight.detach(), head.bias.detach()
    del head.weight, head.bias
    head.weight = weight
    head.register_buffer("bias", bias)
    assert weight_and_bias(head) == (weight, bias)


def test_a_parameter_that_is_spread_over_processes_is_refused():
    hidden, weight, labels, _ = problem()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        part = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        for given in ((hidden, part), (part, weight)):
            with pytest.raises(TypeError, match=r"is a DTensor.*: .*ObjectiveHead.*full_tensor\(\)"):
                chunked_objective(*given, labels, None, 0.0, Objective())
    finally:
        dist.destroy_process_group()


def test_objective_head_uses_the_bias():
    hidden, _, labels, logits = problem()
    head, targets = nn.Linear(D, V), LogitTargets(logits)
    loss = ObjectiveHead(head, Objective())(hidden, labels, targets, 0.0)[0]
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_by_finite_differences_in_float64(divergence, kind):
    if kind == "sampled" and divergence == "reverse_kl":
        return  # infinite: the bucket has no teacher mass
    hidden, weight, labels, logits = problem(torch.float64, n=7)
    targets = targets_of(kind, logits, torch.float64)
    sampled = kind == "sampled" and divergence == "forward_kl"
    objective = Objective(divergence=divergence, tail="none" if sampled else "other_bucket", chunk_tokens=2)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, logits[1].double())]

    def loss(h, w, b):
        return chunked_objective(h, w, labels, targets, 0.6, objective, None, b).loss

    gradients = torch.autograd.grad(loss(*leaves), leaves)
    generator = torch.Generator().manual_seed(3)
    for place, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x.detach() for x in leaves]
            moved[place] = moved[place] + step * direction
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_a_second_backward_pass_is_refused():
    hidden, weight, labels, _ = problem()
    loss = chunked_objective(hidden.requires_grad_(), weight, labels, None, 0.0, Objective()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()
