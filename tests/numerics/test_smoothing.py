"""Label smoothing, z-loss, weights and losses per token against an fp64 truth, from their definitions.

The truth holds all probabilities and lets autograd find gradients; the chunked path never has them.
In a process started with TRITON_INTERPRET=1 and TUTELAGE_KERNELS=triton the same tests run over the kernels.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from divergence_definitions import definition
from interpreted_triton import run_again, where_triton_is

from tutelage.objective import DIVERGENCES, Objective, chunked_objective, reference_objective
from tutelage.types import IGNORE_INDEX, DenseTargets, LogitTargets, LogitTransform, SparseTargets

N, D, E, V, PADDED = 23, 8, 6, 41, 47
SETTINGS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.3, "z_loss": 1e-4},
    {},
]
EXTREMES = {
    "plain": {},
    "over-confident student": {"student": 25.0},  # logits of about +-80
    "one-hot teacher": {"teacher": 40.0},
    "one token": {"n": 1},
    "all masked": {"masked": 1.1},
    "nothing masked": {"masked": 0.0},
}


class Problem:
    """A student with a padded head, a teacher as logits, some labels masked, signed weights per token."""

    def __init__(self, n=N, student=1.0, teacher=1.0, masked=0.3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = student * torch.randn(n, D, generator=g)
        self.weight, self.bias = torch.randn(PADDED, D, generator=g), torch.randn(PADDED, generator=g)
        self.labels = torch.randint(0, V, (n,), generator=g)
        if n > 1:
            self.labels[torch.rand(n, generator=g) < masked] = IGNORE_INDEX
        self.taught, self.head = teacher * torch.randn(n, E, generator=g), torch.randn(PADDED, E, generator=g)
        self.token_weights = 2 * torch.rand(n, generator=g) - 0.5
        self.token_weights[0] = 0.0

    def targets(self, kind, temperature):
        logits = (self.taught @ self.head.T)[:, :V]
        if kind == "hidden states":
            return DenseTargets(self.taught, self.head)
        if kind == "logits":
            return LogitTargets(logits)
        probs, ids = (logits / temperature).softmax(-1).topk(7)
        gold = logits.log_softmax(-1).gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        return SparseTargets(ids, probs, (1 - probs.double().sum(-1)).clamp(min=0).float(), gold, temperature)


def truth(problem, targets, alpha, objective, transform, token_weights):
    """(loss, gradients of hidden, weight, bias, losses per token [5, N]), in float64."""
    h, w, b = (x.double().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias))
    logits = transform.scale * (h @ w[:V].T + b[:V])
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    valid = problem.labels != IGNORE_INDEX
    gold = torch.nn.functional.one_hot(problem.labels.clamp(min=0), V).double()
    log_q = logits - logits.logsumexp(1, keepdim=True)
    ce = -(gold * log_q).sum(1)
    share = objective.label_smoothing
    smoothed = -((1 - share) * gold * log_q + share / V * log_q).sum(1)
    kd, teacher_ce, ce_weight, kd_weight = torch.zeros_like(ce), torch.zeros_like(ce), 1.0, 0.0
    if targets is not None:
        ce_weight = 1.0 if objective.mixing == "keep_full_ce" else 1 - alpha
        kd_weight = 1.0 if objective.mixing == "keep_full_kd" else alpha
        kd = objective.kd_scale * divergence(problem, targets, logits, objective)
        log_p = (problem.taught.double() @ problem.head[:V].double().T).log_softmax(1)
        teacher_ce = -(gold * log_p).sum(1)
    loss = ce_weight * smoothed + kd_weight * kd + objective.z_loss * logits.exp().sum(1).log() ** 2
    if token_weights is not None:
        loss = token_weights.double() * loss
    entropy = -(log_q.exp() * log_q).sum(1)
    each = torch.stack([loss, ce, kd, teacher_ce, entropy]) * valid
    total = torch.where(valid, loss, 0.0).sum()
    return total.detach(), torch.autograd.grad(total, (h, w, b)), each.detach()


def divergence(problem, targets, logits, objective):
    t = objective.temperature
    teacher = (problem.taught.double() @ problem.head[:V].double().T) / t
    if objective.divergence == "hard_labels":
        return -logits.log_softmax(1).gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
    q, p = (logits / t).log_softmax(1), teacher.log_softmax(1)
    if isinstance(targets, SparseTargets):
        kept = torch.zeros_like(q).scatter(1, targets.ids_NK, 1.0) > 0
        rest = q.masked_fill(kept, -torch.inf).logsumexp(1, keepdim=True)
        q = torch.cat([q.gather(1, targets.ids_NK), rest], 1)
        p = torch.cat([targets.probs_NK.double(), targets.tail_N.double().unsqueeze(1)], 1).log()
    return definition(objective.divergence, q, p, objective)


def found(function, problem, targets, alpha, objective, transform, token_weights):
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    settings = {"bias_V": leaves[2], "transform": transform, "vocab_size": V, "per_token": True}
    given = problem.labels, targets, alpha, objective
    sums = function(*leaves[:2], *given, token_weights_N=token_weights, **settings)
    sums.loss.backward()
    each = sums.tokens
    per_token = torch.stack([each.loss_N, each.ce_N, each.kd_N, each.teacher_ce_N, each.entropy_N])
    torch.testing.assert_close(
        torch.stack([sums.loss.detach(), sums.ce, sums.kd, sums.teacher_ce]), per_token[:4].sum(1)
    )
    torch.testing.assert_close(sums.effective_alpha, each.effective_alpha_N.sum())
    assert not any(x.requires_grad for x in (per_token, sums.ce, sums.kd))
    return sums.loss.detach(), [x.grad for x in leaves], per_token


def assert_exact(problem, targets, alpha, objective, transform=LogitTransform(), token_weights=None):  # noqa: B008
    settings = targets, alpha, objective, transform, token_weights
    loss, gradients, each = truth(problem, *settings)
    logits = 1 + float((problem.hidden @ problem.weight.T).abs().max())
    for function in (chunked_objective, reference_objective):
        mine = found(function, problem, *settings)
        tolerance = 3e-7 * logits * (1 + objective.temperature)
        for name, ours, true in (
            ("loss", mine[0], loss),
            *zip(("d hidden", "d weight", "d bias"), mine[1], gradients, strict=True),
            ("per token", mine[2], each),
        ):
            error = float((ours.double() - true).abs().max()) if true.numel() else 0.0
            assert error <= tolerance * max(1.0, float(true.abs().max())), (
                f"{function.__name__}: {name} {error}"
            )


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_extremes(settings, kind):
    problem = Problem(**EXTREMES[kind])
    for weighted, targets in itertools.product((False, True), (None, "hidden states", "sparse")):
        objective = Objective(chunk_tokens=5, **settings)
        given = None if targets is None else problem.targets(targets, 1.0)
        alpha, weights = 0.0 if targets is None else 0.4, problem.token_weights if weighted else None
        assert_exact(problem, given, alpha, objective, token_weights=weights)


@pytest.mark.parametrize("divergence_name", [*DIVERGENCES, "hard_labels"])
@pytest.mark.parametrize("targets", ["logits", "hidden states", "sparse"])
def test_every_divergence(divergence_name, targets):
    problem = Problem(seed=1)
    for temperature, mixing in ((1.0, "convex"), (2.0, "keep_full_kd"), (0.5, "keep_full_ce")):
        objective = Objective(
            divergence=divergence_name, temperature=temperature, mixing=mixing, skew=0.2, jsd_beta=0.3,
            label_smoothing=0.2, z_loss=1e-3, chunk_tokens=7,
        )  # fmt: skip
        transform = LogitTransform(0.7, 20.0)
        given = problem.targets(targets, temperature)
        assert_exact(problem, given, 0.3, objective, transform, problem.token_weights)


def test_neither_of_them_changes_a_bit_of_what_is_reported():
    """Their terms are in the loss alone: cross-entropies compare between runs with and without them."""
    problem, plain = Problem(), Objective(chunk_tokens=5)
    more = plain.model_copy(update={"label_smoothing": 0.2, "z_loss": 1e-2})
    for kind in (None, "logits", "sparse"):
        given = None if kind is None else problem.targets(kind, 1.0)
        a, b = (
            chunked_objective(
                problem.hidden, problem.weight, problem.labels, given, 0.4 if kind else 0.0, objective,
                vocab_size=V, token_weights_N=weights,
            )
            for objective, weights in ((plain, None), (more, problem.token_weights))
        )  # fmt: skip
        assert [*map(float, (a.ce, a.kd, a.teacher_ce))] == [*map(float, (b.ce, b.kd, b.teacher_ce))]
        assert a.loss != b.loss


@pytest.mark.slow
@where_triton_is
def test_the_triton_kernels_pass_too():
    run_again(__file__, "plain and smoothing or nothing and z_loss or forward_kl or hard_labels or all")
