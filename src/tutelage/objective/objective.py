"""The training objective, (1 - alpha) CE + alpha T^2 D(teacher, student), as readable maths.

`reference_objective` holds all logits and is for reading and for tests. Training uses
`tutelage.objective.chunked.chunked_objective`, which has the same signature and the same value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.objective.divergences import DIVERGENCES
from tutelage.types import IGNORE_INDEX, DenseTargets, LossSums


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised; fields as in `tutelage.config.ObjectiveConfig`.

    Attributes:
        divergence: a name in `DIVERGENCES`.
        temperature: T > 0; both models' logits are divided by it inside the divergence.
        temperature_squared: multiply the divergence, value and gradient, by T^2 (Hinton et al. 2015,
            arXiv 1503.02531), which keeps its gradient from shrinking as T grows.
        chunk_tokens: tokens whose logits exist at one time; None lets the chunked path choose.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = True
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence!r}: choose one of {', '.join(DIVERGENCES)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0")

    @property
    def kd_scale(self) -> float:
        """Factor on the divergence: T^2 or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0


def check_inputs(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, targets: DenseTargets | None, alpha: float
) -> None:
    """Raise ValueError, naming the argument, if shapes, alpha or teacher do not fit together."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha}: must be between 0 and 1")
    if alpha > 0 and targets is None:
        raise ValueError(f"alpha {alpha}: needs teacher targets, but targets is None")
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:  # noqa: PLR2004 - two axes
        raise ValueError(f"hidden {tuple(hidden_ND.shape)}: must be [tokens, {weight_VD.shape[1]}]")
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"labels {tuple(labels_N.shape)}: must be [{hidden_ND.shape[0]}], one per token")
    if targets is None:
        return
    if targets.head_VE.shape[0] != weight_VD.shape[0]:
        raise ValueError(
            f"teacher vocabulary {targets.head_VE.shape[0]}: must equal the student's, {weight_VD.shape[0]}"
        )
    expected = (hidden_ND.shape[0], targets.head_VE.shape[1])
    if tuple(targets.hidden_NE.shape) != expected:
        raise ValueError(f"teacher hidden {tuple(targets.hidden_NE.shape)}: must be {expected}")


def reference_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: DenseTargets | None,
    alpha: float,
    objective: Objective,
) -> LossSums:
    """The objective summed over valid tokens, holding all [N, V] logits.

    Args:
        hidden_ND: student hidden states after the final norm.
        weight_VD: the student's output embedding.
        labels_N: next-token ids, `IGNORE_INDEX` where there is no loss.
        targets: the teacher's distributions for the same tokens; None only with alpha 0.
        alpha: weight of the divergence, in [0, 1]; 1 - alpha weighs the cross-entropy.
        objective: divergence and temperature.

    Raises:
        ValueError: if shapes or vocabularies do not fit, or alpha is outside [0, 1].
    """
    check_inputs(hidden_ND, weight_VD, labels_N, targets, alpha)
    valid_N = labels_N != IGNORE_INDEX
    logits_NV = (hidden_ND @ weight_VD.to(hidden_ND.dtype).T).float()[valid_N]
    ce = F.cross_entropy(logits_NV, labels_N[valid_N], reduction="sum")
    if targets is None:
        zero = torch.zeros_like(ce)
        return LossSums(ce, ce.detach(), zero, zero)
    teacher_NV = (targets.hidden_NE @ targets.head_VE.to(targets.hidden_NE.dtype).T).float()[valid_N]
    t = objective.temperature
    d_N = DIVERGENCES[objective.divergence].value(
        (logits_NV / t).log_softmax(-1), (teacher_NV / t).log_softmax(-1)
    )
    kd = objective.kd_scale * d_N.sum()
    teacher_ce = F.cross_entropy(teacher_NV, labels_N[valid_N], reduction="sum")
    return LossSums((1 - alpha) * ce + alpha * kd, ce.detach(), kd.detach(), teacher_ce)
