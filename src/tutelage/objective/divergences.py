"""Divergences between teacher and student: each as its definition and with its gradient by formula.

All are per token, in nats, of float32 log-probabilities over the same K outcomes (the vocabulary, or kept
ids and a bucket for the rest), at least 0, and 0 exactly when the distributions are equal. An outcome whose
probability is zero on both sides (log-probability -inf) adds nothing. p is the teacher, q the student, and
gradients are with respect to the student's *logits*: q_v (g_v - sum_u q_u g_u) for g = dD/dq.

Adding a divergence is one function pair and one line in `DIVERGENCES`; the contract tests run over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tutelage.config.objective_config import Objective


@dataclass(frozen=True)
class Divergence:
    """A divergence D(teacher || student).

    Attributes:
        summary: definition in words, and its paper.
        value: (logq_NK, logp_NK, objective) -> value_N, differentiable; the definition.
        value_and_gradient: the same arguments -> (value_N, logit gradient_NK), written by hand.
    """

    summary: str
    value: Callable[[Tensor, Tensor, Objective], Tensor]
    value_and_gradient: Callable[[Tensor, Tensor, Objective], tuple[Tensor, Tensor]]


def _expect(log_weight: Tensor, x: Tensor) -> Tensor:
    """exp(log_weight) * x, with 0 where the weight is 0 whatever x is (infinite or undefined)."""
    present = log_weight > -math.inf
    return torch.where(present, log_weight.exp() * torch.where(present, x, 0.0), 0.0)


def _mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(weight_a a + (1 - weight_a) b)."""
    return torch.logaddexp(log_a + math.log(weight_a), log_b + math.log1p(-weight_a))


def _through_softmax(logq: Tensor, q_times_g: Tensor) -> Tensor:
    """Logit gradient q (g - sum q g) from q g, where g is the derivative with respect to q."""
    return q_times_g - logq.exp() * q_times_g.sum(-1, keepdim=True)


def forward_kl(logq: Tensor, logp: Tensor, _: Objective) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
    return _expect(logp, logp - logq).sum(-1)


def _forward_kl(logq: Tensor, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    return forward_kl(logq, logp, objective), logq.exp() * logp.exp().sum(-1, keepdim=True) - logp.exp()


def reverse_kl(logq: Tensor, logp: Tensor, _: Objective) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v)."""
    return _expect(logq, logq - logp).sum(-1)


def _reverse_kl(logq: Tensor, logp: Tensor, _: Objective) -> tuple[Tensor, Tensor]:
    terms = _expect(logq, logq - logp)
    return terms.sum(-1), _through_softmax(logq, terms)


def jsd(logq: Tensor, logp: Tensor, objective: Objective) -> Tensor:
    """Beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q."""
    logm = _mixture(logp, logq, objective.jsd_beta)
    beta = objective.jsd_beta
    return (beta * _expect(logp, logp - logm) + (1 - beta) * _expect(logq, logq - logm)).sum(-1)


def _jsd(logq: Tensor, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Here g = (1 - beta) log(q / m); the other terms of the derivative cancel."""
    beta, logm = objective.jsd_beta, _mixture(logp, logq, objective.jsd_beta)
    student = (1 - beta) * _expect(logq, logq - logm)
    value = (beta * _expect(logp, logp - logm) + student).sum(-1)
    return value, _through_softmax(logq, student)


def skew_kl(logq: Tensor, logp: Tensor, objective: Objective) -> Tensor:
    """KL(p || m) with m = skew p + (1 - skew) q."""
    return _expect(logp, logp - _mixture(logp, logq, objective.skew)).sum(-1)


def _skew_kl(logq: Tensor, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Here q g = -(1 - skew) q p / m, taken as p times the student's share of m."""
    logm = _mixture(logp, logq, objective.skew)
    share = _expect(logq, torch.exp(logp - logm)) * (1 - objective.skew)
    return _expect(logp, logp - logm).sum(-1), _through_softmax(logq, -share)


def skew_reverse_kl(logq: Tensor, logp: Tensor, objective: Objective) -> Tensor:
    """KL(q || m) with m = (1 - skew) p + skew q."""
    return _expect(logq, logq - _mixture(logq, logp, objective.skew)).sum(-1)


def _skew_reverse_kl(logq: Tensor, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Here g = log(q / m) + 1 - skew q / m; the 1 vanishes in the softmax."""
    logm = _mixture(logq, logp, objective.skew)
    terms = _expect(logq, logq - logm)
    return terms.sum(-1), _through_softmax(
        logq, terms - objective.skew * _expect(logq, torch.exp(logq - logm))
    )


def tvd(logq: Tensor, logp: Tensor, _: Objective) -> Tensor:
    """Total variation distance, 0.5 sum_v |p_v - q_v|."""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


def _tvd(logq: Tensor, logp: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    q = logq.exp()
    return tvd(logq, logp, objective), _through_softmax(logq, 0.5 * q * torch.sign(q - logp.exp()))


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        "KL(teacher || student); Hinton et al., arXiv 1503.02531; the loss of arXiv 2605.23857.",
        forward_kl,
        _forward_kl,
    ),
    "reverse_kl": Divergence(
        "KL(student || teacher), mode-seeking; MiniLLM, arXiv 2306.08543.", reverse_kl, _reverse_kl
    ),
    "jsd": Divergence(
        "Generalised Jensen-Shannon divergence with weight jsd_beta on the teacher; GKD, arXiv 2306.13649.",
        jsd,
        _jsd,
    ),
    "skew_kl": Divergence(
        "KL(teacher || skew teacher + (1-skew) student); DistiLLM, arXiv 2402.03898.", skew_kl, _skew_kl
    ),
    "skew_reverse_kl": Divergence(
        "KL(student || (1-skew) teacher + skew student); DistiLLM, arXiv 2402.03898.",
        skew_reverse_kl,
        _skew_reverse_kl,
    ),
    "tvd": Divergence(
        "Total variation distance, half the L1 distance; f-distill, arXiv 2307.15190.", tvd, _tvd
    ),
}
