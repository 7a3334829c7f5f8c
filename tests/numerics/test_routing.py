"""Routing: a divergence on the tokens that a gate passes, CE on the rest, against its definition in float64.

In a process started with TRITON_INTERPRET=1 and TUTELAGE_KERNELS=triton the same tests run over the Triton
kernels; `test_the_triton_kernels_pass_too` starts one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from divergence_definitions import definition
from interpreted_triton import run_again, where_triton_is

from tutelage.config.load import validate
from tutelage.config.objective_config import ObjectiveConfig
from tutelage.objective import DIVERGENCES, Objective, TopK, chunked_objective, make_gate, reference_objective
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, SparseTargets

GATES = ["teacher_certainty", "teacher_entropy", "student_entropy", "teacher_ahead", "random"]
KEEP = 0.3
EXTREMES = {
    "plain": {},
    "one token": {"n": 1, "v": 7},
    "odd sizes and padding": {"n": 41, "v": 131, "padded": 7},
    "over-confident student": {"student_scale": 20.0},
    "one-hot teacher": {"teacher_scale": 20.0},
    "large logits of both": {"student_scale": 40.0, "teacher_scale": 40.0},
}


class Problem:
    """Student, teacher and labels, some of them masked, in float32."""

    def __init__(self, n=37, d=16, e=11, v=53, student_scale=1.0, teacher_scale=1.0, padded=0):
        g = torch.Generator().manual_seed(3)
        self.vocab = v
        self.hidden = torch.randn(n, d, generator=g) * student_scale
        self.weight = torch.randn(v + padded, d, generator=g)
        self.labels = torch.randint(0, v, (n,), generator=g)
        self.labels[2 :: max(3, n // 4)] = IGNORE_INDEX
        self.teacher = torch.randn(n, e, generator=g) * torch.rand(n, 1, generator=g) * teacher_scale
        self.head = torch.randn(v + 2 * padded, e, generator=g)
        self.draws = torch.rand(n, generator=g)
        self.token_weights = torch.rand(n, generator=g) + 0.5

    def logits(self):
        """The student's and the teacher's, in float64 without padding."""
        return (
            (self.hidden.double() @ self.weight.double().T)[:, : self.vocab],
            (self.teacher.double() @ self.head.double().T)[:, : self.vocab],
        )

    def measure(self, kind, p=None):
        """What a gate sorts tokens by, from its definition; the larger, the sooner a token is taught."""
        student, teacher = (x.log_softmax(-1) for x in self.logits())
        gold = self.labels.clamp(min=0).unsqueeze(1)
        entropy = lambda logp: -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)  # noqa: E731
        return {
            "teacher_certainty": -entropy(teacher if p is None else p),
            "teacher_entropy": entropy(teacher if p is None else p),
            "student_entropy": entropy(student),
            "teacher_ahead": (teacher - student).gather(1, gold).squeeze(1),
            "random": -self.draws.double(),
        }[kind]


def routed(problem, kind, p=None):
    """A gate whose threshold lies between two tokens, and which tokens it is to pass."""
    values = problem.measure(kind, p)
    order = values[problem.labels != IGNORE_INDEX].sort(descending=True).values
    passed = max(1, round(KEEP * len(order)))
    if kind == "random":
        threshold, chosen = None, problem.draws < KEEP
    else:
        gaps = (order[:-1] - order[1:])[max(0, passed - 3) : passed + 3]
        place = int(gaps.argmax()) + max(0, passed - 3) if len(order) > 1 else 0
        low = order[place + 1] if len(order) > 1 else order[0] - 1.0
        threshold = float((order[place] + low) / 2)
        chosen = values > threshold
    option = {"drop": 1 - KEEP} if kind == "teacher_entropy" else {"keep": KEEP}
    gate = make_gate(validate(ObjectiveConfig, {"gate": {"kind": kind} | option}, "test").gate)
    if threshold is not None:
        gate.load({"threshold": abs(threshold) if kind == "teacher_certainty" else threshold})
    gate.begin(lambda: problem.draws)
    return gate, chosen


def truth(problem, chosen, objective, p=None):
    """Loss and gradients in float64: D over its share on the chosen tokens, CE over the rest's on others."""
    hidden, weight = (x.double().requires_grad_() for x in (problem.hidden, problem.weight))
    keep = problem.labels != IGNORE_INDEX
    logits = (hidden @ weight.T)[:, : problem.vocab]
    logq = logits.log_softmax(-1)
    ce = -logq.gather(1, problem.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    smooth = objective.label_smoothing
    ce = (1 - smooth) * ce - smooth * logq.mean(-1)
    t = objective.temperature
    q = (logits / t).log_softmax(-1)
    if p is None:
        p = (problem.logits()[1] / t).log_softmax(-1)
    else:  # kept ids, and one outcome for the rest
        kept = p[:, :-1] > -torch.inf
        rest = q.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
        q = torch.cat([q.masked_fill(~kept, -torch.inf), rest], 1)
    d = t**2 * definition(objective.divergence, q, p, objective)
    share = torch.where(chosen, 1 / KEEP, 1 / (1 - KEEP))
    loss = problem.token_weights * share * torch.where(chosen, d, ce)
    loss = loss + problem.token_weights * objective.z_loss * logits.logsumexp(-1).square()
    loss = loss[keep].sum()
    loss.backward()
    return [x.detach().numpy() for x in (loss, hidden.grad, weight.grad)]


def ours(function, problem, gate, targets, objective):
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    sums = function(
        hidden,
        weight,
        problem.labels,
        targets,
        1.0,
        objective,
        gate,
        vocab_size=problem.vocab,
        token_weights_N=problem.token_weights,
        per_token=True,
    )
    sums.loss.backward()
    assert torch.isclose(sums.tokens.loss_N.sum(), sums.loss, rtol=1e-5)
    return sums, [x.detach().double().numpy() for x in (sums.loss, hidden.grad, weight.grad)]


def assert_close(problem, found, expected):
    largest = max(float(x.abs().max()) for x in problem.logits())
    for true, mine in zip(expected, found, strict=True):
        assert np.isfinite(mine).all()
        assert np.abs(mine - true).max() <= 1e-5 * (1 + largest / 10) * max(1.0, np.abs(true).max())


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("kind", GATES)
def test_dense_targets(kind, case):
    problem = Problem(**EXTREMES[case])
    gate, chosen = routed(problem, kind)
    for divergence in DIVERGENCES if kind == "teacher_certainty" else ("reverse_kl", "forward_kl"):
        objective = Objective(
            mixing="routed", divergence=divergence, chunk_tokens=10, skew=0.2, temperature=2.0
        )
        expected = truth(problem, chosen, objective)
        for function in (chunked_objective, reference_objective):
            targets = DenseTargets(problem.teacher, problem.head)
            sums, found = ours(function, problem, gate, targets, objective)
            assert_close(problem, found, expected)
            valid = problem.labels != IGNORE_INDEX
            assert float(sums.effective_alpha) == int((chosen & valid).sum())


@pytest.mark.parametrize("kind", ["teacher_certainty", "student_entropy", "random"])
def test_logits_smoothing_z_loss_and_truncation(kind):
    problem = Problem()
    gate, chosen = routed(problem, kind)
    logits = LogitTargets(problem.logits()[1].float())
    common = {"mixing": "routed", "chunk_tokens": 10}
    plain = Objective(divergence="reverse_kl", label_smoothing=0.1, z_loss=0.01, **common)
    assert_close(
        problem, ours(chunked_objective, problem, gate, logits, plain)[1], truth(problem, chosen, plain)
    )
    p = top(problem, 5)
    cut = Objective(truncation=TopK(k=5), **common)
    assert_close(
        problem, ours(chunked_objective, problem, gate, logits, cut)[1], truth(problem, chosen, cut, p)
    )


def top(problem, k):
    """Log-probabilities of the teacher's top k and, last, of the rest."""
    logp = problem.logits()[1].log_softmax(-1)
    ids = logp.topk(k).indices
    kept = torch.zeros_like(logp, dtype=torch.bool).scatter(1, ids, value=True)
    rest = logp.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.masked_fill(~kept, -torch.inf), rest], 1)


@pytest.mark.parametrize("kind", ["teacher_certainty", "teacher_ahead"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_sparse_targets_are_sorted_by_the_entropy_of_what_is_kept(kind, divergence):
    problem = Problem()
    p = top(problem, 6)
    gate, chosen = routed(problem, kind, p)
    ids = problem.logits()[1].topk(6).indices
    gold = problem.logits()[1].log_softmax(-1).gather(1, problem.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    targets = SparseTargets(ids, p.exp().gather(1, ids).float(), p[:, -1].exp().float(), gold.float())
    objective = Objective(mixing="routed", divergence=divergence, chunk_tokens=10)
    expected = truth(problem, chosen, objective, p)
    for function in (chunked_objective, reference_objective):
        assert_close(problem, ours(function, problem, gate, targets, objective)[1], expected)


@pytest.mark.parametrize("kind", GATES)
def test_nothing_to_learn_and_no_threshold_yet(kind):
    """All labels masked: no loss. No threshold: cross-entropy alone, as at alpha 0; random needs none."""
    problem = Problem(n=6)
    targets = DenseTargets(problem.teacher, problem.head)
    objective = Objective(mixing="routed", divergence="reverse_kl")
    masked = Problem(n=6)
    masked.labels[:] = IGNORE_INDEX
    gate, _ = routed(problem, kind)
    sums, (loss, *gradients) = ours(chunked_objective, masked, gate, targets, objective)
    assert loss == 0
    assert not any(x.any() for x in gradients)
    new = make_gate(validate(ObjectiveConfig, {"gate": {"kind": kind}}, "test").gate)
    new.begin(lambda: problem.draws)
    sums, _ = ours(chunked_objective, problem, new, targets, objective)
    if kind != "random":
        assert float(sums.effective_alpha) == 0
        alone = chunked_objective(
            problem.hidden, problem.weight, problem.labels, None, 0.0, Objective(),
            token_weights_N=problem.token_weights,
        )  # fmt: skip
        torch.testing.assert_close(sums.loss, alone.loss)


@pytest.mark.slow
@where_triton_is
def test_the_triton_kernels_pass_too():
    run_again(__file__)
