"""The losses that torchtune, TRL and NeMo Automodel define, in float64, on one `LogitTargets` used by all.

The formulas are written down from the projects' documented definitions. Nobody copies the teacher's logits
between the calls.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tutelage.objective import Objective, chunked_objective, reference_objective
from tutelage.types import IGNORE_INDEX, LogitTargets

N, D, V = 31, 12, 67
TEACHERS = {"ordinary": 1.0, "one-hot": 60.0, "flat": 0.0}


@pytest.fixture(scope="module", params=TEACHERS)
def problem(request):
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(*shape, generator=g) for shape in ((N, D), (V, D), (N, V)))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::4] = IGNORE_INDEX
    return hidden, weight, labels, LogitTargets(teacher * TEACHERS[request.param])


def logs(problem, temperature=1.0):
    """Student's leaf tensors and log-probabilities of student and teacher on the labelled tokens, float64."""
    hidden, weight, labels, targets = problem
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    keep = labels != IGNORE_INDEX
    q = ((h @ w.T)[keep] / temperature).log_softmax(-1)
    return h, w, q, (targets.logits_NV[keep].double() / temperature).log_softmax(-1)


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def torchtune_forward_kl(problem):
    """Minus the mean over labelled tokens of sum p log q: the KL, and the teacher's entropy as a constant."""
    h, w, q, p = logs(problem)
    return h, w, -(p.exp() * q).sum(-1).mean(), -(p.exp() * p).sum(-1).mean()


def torchtune_reverse_kl(problem):
    h, w, q, p = logs(problem)
    return h, w, kl(q, p).mean(), 0.0


def torchtune_symmetric_kl(problem):
    """Half of each direction."""
    h, w, q, p = logs(problem)
    return h, w, (kl(p, q) + kl(q, p)).mean() / 2, 0.0


def trl_generalised_jsd(problem, beta, temperature):
    """GKD: beta KL(teacher || m) + (1 - beta) KL(student || m), its ends the two KLs, without T^2."""
    h, w, q, p = logs(problem, temperature)
    if beta in (0.0, 1.0):
        return h, w, (kl(p, q) if beta == 0.0 else kl(q, p)).mean(), 0.0
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return h, w, (beta * kl(p, m) + (1 - beta) * kl(q, m)).mean(), 0.0


def nemo_kd(problem, temperature):
    """T^2 times the mean of the forward KL over labelled tokens, both sides at T."""
    h, w, q, p = logs(problem, temperature)
    return h, w, temperature**2 * kl(p, q).mean(), 0.0


def trl(beta):
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    return {"divergence": name, "jsd_beta": beta if 0 < beta < 1 else 0.5}


CASES = [
    ("torchtune forward KL", torchtune_forward_kl, (), [(Objective(), 1.0)]),
    ("torchtune reverse KL", torchtune_reverse_kl, (), [(Objective(divergence="reverse_kl"), 1.0)]),
    (
        "torchtune symmetric KL",
        torchtune_symmetric_kl,
        (),
        [(Objective(), 0.5), (Objective(divergence="reverse_kl"), 0.5)],
    ),
    *(
        (
            f"TRL GKD, beta {beta}, T {t}",
            trl_generalised_jsd,
            (beta, t),
            [(Objective(**trl(beta), temperature=t, temperature_squared=False), 1.0)],
        )
        for beta, t in itertools.product((0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.0))
    ),
    *((f"NeMo KD, T {t}", nemo_kd, (t,), [(Objective(temperature=t), 1.0)]) for t in (0.5, 1.0, 4.0)),
]


@pytest.mark.parametrize("function", [chunked_objective, reference_objective])
def test_their_losses_in_any_order_on_one_teacher(problem, function):
    hidden, weight, labels, targets = problem
    before = targets.logits_NV.clone()
    count = int((labels != IGNORE_INDEX).sum())
    for name, theirs, arguments, objectives in [*CASES, *reversed(CASES)]:
        h, w, value, constant = theirs(problem, *arguments)
        if not bool(value.isfinite()):
            continue  # their own formula gives 0 * inf for a one-hot teacher
        value.backward()
        ours_h, ours_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = torch.zeros(())
        for objective, share in objectives:
            loss = function(ours_h, ours_w, labels, targets, 1.0, objective).loss
            loss /= count
            total = total + share * loss
        total.backward()
        assert total.item() + float(constant) == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        scale = max(1.0, float(value.detach().abs()))
        torch.testing.assert_close(ours_h.grad.double(), h.grad, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(ours_w.grad.double(), w.grad, rtol=1e-4, atol=1e-6 * scale)
    assert torch.equal(targets.logits_NV, before)
