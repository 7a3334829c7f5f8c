"""What a gate may look at: per-token quantities of one chunk, computed only if the gate asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.objective.gates import TokenStats
from tutelage.types import SparseTargets, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.objective.gates import Gate


@torch.no_grad()
def token_stats(
    gate: Gate,
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    targets: Targets,
    ce_C: Tensor,
    teacher_ce_C: Tensor,
) -> TokenStats:
    """Statistics of the tokens of one chunk at T=1.

    Args:
        gate: says what it needs.
        student_CV: student logits.
        teacher_CV: teacher logits, None where there are only sparse targets.
        targets: of these tokens. From sparse ones the teacher's entropy is that of the kept ids and one
            outcome for the rest, a lower bound.
        ce_C: student's cross-entropy on the labels.
        teacher_ce_C: the teacher's.
    """
    needs = gate.needs
    return TokenStats(
        ce_C=ce_C.detach(),
        teacher_ce_C=teacher_ce_C,
        student_entropy_C=_entropy(student_CV.softmax(-1)) if "student_entropy" in needs else None,
        teacher_entropy_C=_entropy(_teacher(teacher_CV, targets)) if "teacher_entropy" in needs else None,
        teacher_max_C=_teacher(teacher_CV, targets).amax(-1) if "teacher_max" in needs else None,
    )


def _teacher(teacher_CV: Tensor | None, targets: Targets) -> Tensor:
    if teacher_CV is not None:
        return teacher_CV.softmax(-1)
    assert isinstance(targets, SparseTargets)  # noqa: S101 - dense targets come with their logits
    return torch.cat([targets.probs_NK, targets.tail_N.unsqueeze(1)], 1)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)
