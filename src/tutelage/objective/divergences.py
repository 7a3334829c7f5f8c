"""Divergences between teacher and student, each once as readable maths and once with its gradient.

All are per token, in nats, computed from float32 log-probabilities, and zero exactly when the two
distributions are equal. Adding one is one `Divergence` entry; the contract tests run over the registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """One named divergence D(teacher || student).

    Attributes:
        summary: what it is and the paper it comes from.
        value: (logp_student_NV, logp_teacher_NV) -> value_N, differentiable; the definition.
        value_and_gradient: same arguments -> (value_N, gradient_NV), where the gradient is with
            respect to the student's *logits*, that is, already taken through log-softmax. It may
            overwrite `logp_student_NV` with the gradient.
    """

    summary: str
    value: Callable[[Tensor, Tensor], Tensor]
    value_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(logp_student_NV: Tensor, logp_teacher_NV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v)."""
    return (logp_teacher_NV.exp() * (logp_teacher_NV - logp_student_NV)).sum(-1)


def _forward_kl_gradient(logp_student_NV: Tensor, logp_teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The logit gradient of KL(p || q) is q - p."""
    p_NV = logp_teacher_NV.exp()
    value_N = (logp_teacher_NV - logp_student_NV).mul_(p_NV).sum(-1)
    return value_N, logp_student_NV.exp_().sub_(p_NV)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        "KL(teacher || student); Hinton et al. 2015, arXiv 1503.02531; the loss of arXiv 2605.23857.",
        forward_kl,
        _forward_kl_gradient,
    ),
}
