"""The mean of teachers' probabilities as targets, against its definition in float64, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from divergence_definitions import definition
from interpreted_triton import run_again, where_triton_is

from tutelage.objective import DIVERGENCES, Objective, TopK, TopP, chunked_objective, reference_objective
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTransform, MeanTargets

CASES = {
    "plain": {},
    "one token": {"n": 1},
    "odd sizes, paddings of their own": {"n": 41, "v": 131, "paddings": (0, 3, 64)},
    "one-hot teachers that disagree": {"teacher_scale": 20.0},
    "over-confident student": {"student_scale": 20.0},
    "large logits of all": {"student_scale": 40.0, "teacher_scale": 40.0},
}


class Problem:
    """A student and three teachers of other widths: one capped, one with a bias, one without context."""

    def __init__(self, n=23, v=53, student_scale=1.0, teacher_scale=1.0, paddings=(0, 0, 0)):
        g = torch.Generator().manual_seed(1)
        self.vocab = v
        self.hidden = torch.randn(n, 16, generator=g) * student_scale
        self.weight = torch.randn(v + paddings[1], 16, generator=g)
        self.labels = torch.randint(0, v, (n,), generator=g)
        self.labels[1::5] = IGNORE_INDEX
        states = [torch.randn(n, width, generator=g) * teacher_scale for width in (7, 11)]
        heads = [
            torch.randn(v + pad, x.shape[1], generator=g) for x, pad in zip(states, paddings, strict=False)
        ]
        bias = torch.randn(len(heads[1]), generator=g)
        unigram = torch.rand(v + paddings[2], 1, generator=g).log()
        self.parts = (
            DenseTargets(states[0], heads[0], LogitTransform(0.5, 30.0)),
            DenseTargets(states[1], heads[1], None, bias),
            DenseTargets(torch.ones(n, 1), unigram),
        )

    def log_mean(self):
        """The definition: log of (p_1 + p_2 + p_3) / 3, each a softmax of its own."""
        logs = []
        for part in self.parts:
            logits = (part.hidden_NE.double() @ part.head_VE.double().T)[:, : self.vocab]
            if part.bias_V is not None:
                logits = logits + part.bias_V.double()[: self.vocab]
            if part.transform is not None:
                logits = 30.0 * torch.tanh(logits * 0.5 / 30.0)
            logs.append(logits.log_softmax(-1))
        return torch.stack(logs).logsumexp(0) - np.log(3)

    def truth(self, alpha, objective, kept=None):
        hidden, weight = (x.double().requires_grad_() for x in (self.hidden, self.weight))
        keep = self.labels != IGNORE_INDEX
        logits = (hidden @ weight.T)[:, : self.vocab]
        t = objective.temperature
        q, p = (logits / t).log_softmax(-1), (self.log_mean() / t).log_softmax(-1)
        if kept is not None:
            rest_p, rest_q = (x.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True) for x in (p, q))
            p, q = (
                torch.cat([x.masked_fill(~kept, -torch.inf), rest], 1)
                for x, rest in ((p, rest_p), (q, rest_q))
            )
        ce = -logits.log_softmax(-1).gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        d = t**2 * definition(objective.divergence, q, p, objective)
        loss = ((1 - alpha) * ce + alpha * d)[keep].sum()
        loss.backward()
        gold = self.log_mean().gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        return [x.detach().numpy() for x in (loss, hidden.grad, weight.grad, -gold[keep].sum())]

    def ours(self, function, alpha, objective):
        hidden, weight = (x.clone().requires_grad_() for x in (self.hidden, self.weight))
        targets = MeanTargets(self.parts)
        sums = function(hidden, weight, self.labels, targets, alpha, objective, vocab_size=self.vocab)
        sums.loss.backward()
        return [x.detach().double().numpy() for x in (sums.loss, hidden.grad, weight.grad, sums.teacher_ce)]

    def assert_right(self, alpha, objective, kept=None):
        size = (
            1 + max(float(self.log_mean().abs().max()), float((self.hidden @ self.weight.T).abs().max())) / 10
        )
        expected = self.truth(alpha, objective, kept)
        for function in (chunked_objective, reference_objective):
            for true, mine in zip(expected, self.ours(function, alpha, objective), strict=True):
                assert np.isfinite(mine).all()
                assert np.abs(mine - true).max() <= 1e-5 * size * max(1.0, np.abs(true).max())


@pytest.mark.parametrize("case", CASES)
def test_every_divergence(case):
    problem = Problem(**CASES[case])
    for divergence in DIVERGENCES:
        for temperature in (1.0, 2.0):
            objective = Objective(
                divergence=divergence, temperature=temperature, skew=0.2, jsd_beta=0.3, chunk_tokens=10
            )
            problem.assert_right(0.4, objective)


def test_truncation_keeps_the_ids_of_the_mean():
    problem = Problem()
    p = problem.log_mean().exp()
    ids = p.topk(6).indices
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, value=True)
    problem.assert_right(1.0, Objective(truncation=TopK(k=6), chunk_tokens=10), kept)
    ordered, ids = p.sort(-1, descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, ordered.cumsum(-1) - ordered < 0.7)
    problem.assert_right(1.0, Objective(truncation=TopP(p=0.7), chunk_tokens=10), kept)


def test_it_is_no_mean_of_logits_and_one_teacher_is_itself():
    problem = Problem()
    one = problem.parts[0]
    given = problem.hidden, problem.weight, problem.labels
    alone = chunked_objective(*given, one, 1.0, Objective())
    twice = chunked_objective(*given, MeanTargets((one, one)), 1.0, Objective())
    torch.testing.assert_close(twice.loss, alone.loss)
    mean, first = (chunked_objective(*given, x, 1.0, Objective()) for x in (MeanTargets(problem.parts), one))
    assert mean.kd < first.kd  # a mean is flatter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: (p.parts[0], DenseTargets(p.parts[1].hidden_NE, p.parts[1].head_VE[:-5])),
            "teacher vocabulary 48",
        ),
        (lambda p: (p.parts[0], p.parts[2].rows(slice(3))), r"targets.parts\[1\].hidden \(3, 1\)"),
        (lambda _: (), "at least one teacher"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        chunked_objective(
            problem.hidden, problem.weight, problem.labels, MeanTargets(change(problem)), 1.0, Objective()
        )


@pytest.mark.parametrize("several", [lambda parts: parts[0], iter, lambda _: None])
def test_parts_that_are_no_tuple_are_refused(several):
    with pytest.raises(
        TypeError, match=r"parts is a \w+: give a tuple with the DenseTargets of each teacher"
    ):
        MeanTargets(several(Problem().parts))


@pytest.mark.slow
@where_triton_is
def test_the_triton_kernels_pass_too():
    run_again(__file__)
