"""Each divergence from its paper's definition, in float64 and without any code of ours."""

from __future__ import annotations

import torch


def kl(log_a, log_b):
    """sum a log(a / b), with 0 log 0 = 0. Logarithms, because even float64 underflows at logits of +-80."""
    there = log_a > -torch.inf
    log_a, log_b = (torch.where(there, x, 0.0) for x in (log_a, log_b))
    return torch.where(there, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def mix(log_a, log_b, weight):
    """log(weight a + (1 - weight) b)."""
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64).log().view(2, 1, 1)
    return (torch.stack([log_a, log_b]).clamp(min=-1e300) + weights).logsumexp(0)


def definition(name, q, p, shape):
    """Each divergence from its paper's definition, of log-probabilities."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = mix(p, q, shape.jsd_beta)
        return shape.jsd_beta * kl(p, m) + (1 - shape.jsd_beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, mix(p, q, shape.skew))
    if name == "skew_reverse_kl":
        return kl(q, mix(q, p, shape.skew))
    assert name == "tvd"
    return (p.exp() - q.exp()).abs().sum(-1) / 2
