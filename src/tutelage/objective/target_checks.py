"""Checks of a teacher's targets, by kind: parts, shapes, and whether they hold probabilities or logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelage.types import (
    IGNORE_INDEX,
    DenseTargets,
    LogitTargets,
    MeanTargets,
    SparseTargets,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tutelage.config.objective_config import Objective

_MASS_TOLERANCE = 1e-3
_LOOKED_AT = 8
"""Rows of logits that are held against probabilities."""


def dense_parts(targets: object) -> list[tuple[DenseTargets, str]]:
    """The distributions with a head that targets are or are made of, by their names in messages."""
    if isinstance(targets, DenseTargets):
        return [(targets, "targets")]
    if not isinstance(targets, MeanTargets):
        return []
    if not targets.parts:
        raise ValueError("targets.parts (): a mean is of at least one teacher")
    for place, part in enumerate(targets.parts):
        if not isinstance(part, DenseTargets):
            raise TypeError(f"targets.parts[{place}] is a {type(part).__name__}: a mean is of DenseTargets")
    return [(part, f"targets.parts[{place}]") for place, part in enumerate(targets.parts)]


def headless_parts(targets: object) -> dict[str, Tensor]:
    """The tensors of targets without a head, by their names in messages."""
    if isinstance(targets, LogitTargets):
        return {"targets.logits": targets.logits_NV}
    if not isinstance(targets, SparseTargets):
        return {}
    return {
        "targets.ids": targets.ids_NK,
        "targets.probs": targets.probs_NK,
        "targets.tail": targets.tail_N,
        "targets.gold_logp": targets.gold_logp_N,
    }


def check_rows(name: str, tensor: Tensor, n: int) -> None:
    """Check that there is a row for each of `n` tokens."""
    if tensor.ndim != 2 or tensor.shape[0] != n:  # noqa: PLR2004 - two axes
        raise ValueError(f"{name} {tuple(tensor.shape)}: must have {n} rows, one per token")


def check_vocabulary(teacher: int, vocab: int, *, cut: bool) -> None:
    """Check a teacher's number of entries; `cut` if the caller has said how many are common."""
    if not cut and teacher != vocab:
        raise ValueError(
            f"teacher vocabulary {teacher}: differs from the student's, {vocab}; if one head is padded, "
            "give vocab_size, the size of the common tokenizer"
        )
    if teacher < vocab:
        raise ValueError(f"vocab_size {vocab}: above the teacher's {teacher} rows")


def check_dense(targets: DenseTargets, name: str, n: int, vocab: int, *, cut: bool) -> None:
    """Check the shapes of hidden states and head."""
    check_rows(f"{name}.hidden", targets.hidden_NE, n)
    if targets.head_VE.ndim != 2:  # noqa: PLR2004 - two axes
        raise ValueError(f"{name}.head {tuple(targets.head_VE.shape)}: must be [vocabulary, width]")
    width = targets.head_VE.shape[1]
    if targets.hidden_NE.shape[1] != width:
        raise ValueError(
            f"{name}.hidden {tuple(targets.hidden_NE.shape)}: must be [{n}, {width}] as its head"
        )
    check_vocabulary(targets.head_VE.shape[0], vocab, cut=cut)


def check_sparse(targets: SparseTargets, n: int, objective: Objective) -> None:
    """Check shapes, and that the objective can do with what was kept."""
    check_rows("targets.ids", targets.ids_NK, n)
    if not targets.ids_NK.shape[1]:
        raise ValueError(f"targets.ids {tuple(targets.ids_NK.shape)}: must hold at least one id per token")
    for name, tensor, shape in (
        ("targets.probs", targets.probs_NK, tuple(targets.ids_NK.shape)),
        ("targets.tail", targets.tail_N, (n,)),
        ("targets.gold_logp", targets.gold_logp_N, (n,)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)}: must be {shape}")
    if objective.truncation is not None:
        raise ValueError("truncation: the targets are sparse already; drop it")
    if objective.divergence != "hard_labels" and targets.temperature != objective.temperature:
        raise ValueError(
            f"targets.temperature {targets.temperature}: must equal the objective's, "
            f"{objective.temperature}, since kept probabilities cannot be taken to another temperature"
        )


def check_logits(logits_NV: Tensor, labels_N: Tensor) -> None:
    """Refuse probabilities, of which a softmax makes nearly uniform ones, by a few tokens with a label."""
    seen_NV = logits_NV[(labels_N != IGNORE_INDEX).nonzero().squeeze(1)[:_LOOKED_AT]]
    if len(seen_NV) < 2 or float(seen_NV.min()) < 0:  # noqa: PLR2004 - logits of one token may sum to 1
        return
    if ((seen_NV.sum(-1, dtype=torch.float64) - 1).abs() < _rounding(logits_NV)).all():
        raise ValueError(
            "targets.logits: rows are not negative and sum to 1, so these are probabilities p; give "
            "p.clamp(min=torch.finfo(p.dtype).tiny).log()"
        )


def check_mass(targets: SparseTargets, labels_N: Tensor, vocab: int, objective: Objective) -> None:
    """Check that what tokens with a label are taught are probabilities, and all of them."""
    if float(targets.probs_NK.min()) < 0 or float(targets.tail_N.min()) < 0:
        raise ValueError("targets.probs, targets.tail: must not be negative")
    if float(targets.gold_logp_N.max()) > _MASS_TOLERANCE:
        raise ValueError("targets.gold_logp: above 0; give the logarithm of the label's probability")
    if objective.tail == "none":
        return
    mass_N = targets.probs_NK.sum(-1, dtype=torch.float64) + targets.tail_N
    rounding = _rounding(targets.probs_NK)
    if float(mass_N.max()) > 1 + rounding:
        raise ValueError(
            f"targets.probs: with the tail they sum to {float(mass_N.max()):.4f}, but probabilities sum to "
            "at most 1 (weights of samples need Objective(tail='none'))"
        )
    if objective.tail != "other_bucket" or objective.divergence == "hard_labels":
        return
    lost_N = (mass_N > 0) & (mass_N < 1 - rounding) & (labels_N != IGNORE_INDEX)
    if lost_N.any():
        raise ValueError(
            f"targets.tail: with it the probabilities of token {int(lost_N.nonzero()[0])} sum to "
            f"{float(mass_N[lost_N][0]):.4f}; give the rest of the mass as its tail, or "
            "Objective(tail='renormalise')"
        )
    if objective.divergence != "reverse_kl":
        return
    all_N = (targets.probs_NK > 0).sum(-1) == vocab
    bare_N = (targets.tail_N == 0) & ~all_N & (labels_N != IGNORE_INDEX)
    if bare_N.any():
        raise ValueError(
            f"targets.tail: 0 at token {int(bare_N.nonzero()[0])}, and reverse KL is infinite where the "
            "teacher has no mass; sum the tail from what was dropped, at least "
            "torch.finfo(torch.float32).tiny"
        )


def _rounding(probabilities: Tensor) -> float:
    """How far from 1 a sum of rounded probabilities may be."""
    return _MASS_TOLERANCE + 4 * torch.finfo(probabilities.dtype).eps
