"""Checks of the inputs of the objective; every message has the argument, its value and the remedy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutelage.config.alpha_config import ConstantAlpha
from tutelage.config.base import plain_number
from tutelage.config.objective_config import Objective, ObjectiveConfig
from tutelage.objective.gates import Gate, Random
from tutelage.objective.target_checks import (
    check_dense,
    check_logits,
    check_mass,
    check_rows,
    check_sparse,
    check_vocabulary,
    dense_parts,
    headless_parts,
)
from tutelage.types import (
    IGNORE_INDEX,
    LogitTargets,
    LogitTransform,
    SparseTargets,
    Targets,
)


class NotFiniteError(ValueError):
    """An input has NaN or infinite values.

    Attributes:
        name: the input: "hidden", "weight", "targets.hidden" and so on.
    """

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"{name}: has {count} values that are NaN or infinite")
        self.name = name


_IDS = {"labels", "targets.ids"}
_FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def check_types(
    hidden_ND: object,
    weight_VD: object,
    labels_N: object,
    targets: object,
    alpha: object,
    objective: object,
    bias_V: object,
    token_weights_N: object,
    transform: object,
) -> None:
    """Raise TypeError, with what to give instead, if an argument is of another kind: the likely mistakes."""
    named = {"hidden": hidden_ND, "weight": weight_VD, "labels": labels_N}
    optional = {"bias": bias_V, "token_weights": token_weights_N}
    for part, name in dense_parts(targets):
        named |= {f"{name}.hidden_NE": part.hidden_NE, f"{name}.head_VE": part.head_VE}
        optional |= {f"{name}.bias": part.bias_V}
    if targets is not None and not isinstance(targets, Targets):
        raise TypeError(
            f"targets is a {type(targets).__name__}: give LogitTargets(logits), DenseTargets(hidden states, "
            "head weight), MeanTargets of several DenseTargets, SparseTargets(ids, probabilities, ...), or "
            "None without a teacher"
        )
    named |= headless_parts(targets) | {name: value for name, value in optional.items() if value is not None}
    for name, value in named.items():
        _check_tensor(name, value)
    _check_transforms(transform, targets)
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective is a {type(objective).__name__}: give an Objective, "
            f"{_AS_OBJECTIVE.get(type(objective), 'Objective(temperature=2.0)')}"
        )
    if isinstance(alpha, Tensor):
        raise TypeError(
            f"alpha is a tensor {tuple(alpha.shape)}: must be one number; weigh the loss of each token by "
            "token_weights_N, or its teaching by a gate"
        )
    numbers: dict[str, object] = {"alpha": alpha}
    if isinstance(targets, SparseTargets):
        numbers["targets.temperature"] = targets.temperature
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"{name} {value!r}: must be a number")


def _check_transforms(transform: object, targets: object) -> None:
    own = {f"{name}.transform": part.transform for part, name in dense_parts(targets)}
    given = {name: value for name, value in own.items() if value is not None}
    for name, value in ({"transform": transform} | given).items():
        if not isinstance(value, LogitTransform):
            raise TypeError(f"{name} is a {type(value).__name__}: give LogitTransform(scale, softcap)")


def check_gate(
    objective: Objective, gate: Gate | None, alpha: float, targets: Targets | None, labels_N: Tensor
) -> None:
    """Raise TypeError if `gate` is none, ValueError if it cannot judge these targets or route tokens.

    Or if the objective is that of a run and says another alpha or gate, which would go unheard.
    """
    if gate is not None and (isinstance(gate, type) or not isinstance(gate, Gate)):
        raise TypeError(f"gate is a {type(gate).__name__}: give make_gate(settings of a gate), or None")
    if isinstance(objective, ObjectiveConfig):
        _check_heard(objective, gate, alpha)
    if isinstance(gate, Random) and targets is not None and gate.draws_N is not None:
        drawn, n = gate.draws_N, labels_N.numel()
        if not isinstance(drawn, Tensor) or drawn.shape != (n,):
            gave = f"{type(drawn).__name__} {tuple(np.shape(drawn))}"
            raise ValueError(
                f"gate random: draw() gave a {gave}: must be a tensor ({n},), a number per token"
            )
    if (
        gate is not None
        and isinstance(targets, SparseTargets)
        and targets.temperature != 1
        and not gate.needs.isdisjoint({"teacher_entropy", "teacher_max"})
    ):
        raise ValueError(
            f"targets.temperature {targets.temperature}: gate {type(gate).__name__} goes by the teacher's "
            "probabilities at temperature 1, which kept ones cannot be taken to"
        )
    if objective.mixing != "routed" or alpha == 0:
        return
    if gate is None or gate.share is None:
        kind = "None" if gate is None else type(gate).__name__
        raise ValueError(
            f"gate {kind}: mixing routed divides each loss by the fraction of tokens that a gate sends to "
            "it; give one that passes a set fraction, such as teacher_certainty, student_entropy or random"
        )
    if alpha != 1:
        raise ValueError(f"alpha {alpha}: mixing routed gives a token either loss whole; must be 0 or 1")


def _check_heard(run: ObjectiveConfig, gate: Gate | None, alpha: float) -> None:
    if run.gate is not None and gate is None:
        raise ValueError(
            f"gate None, but objective.gate is {run.gate.kind}: settings of a run; make the gate once and "
            "give it, gate=make_gate(objective.gate)"
        )
    if isinstance(run.alpha, ConstantAlpha) and run.alpha.value not in {0.0, alpha}:
        raise ValueError(
            f"alpha {alpha}, but objective.alpha is {run.alpha.value}: settings of a run; give the same, or "
            "an Objective, which has none"
        )


_AS_OBJECTIVE: dict[type, str] = {dict: "Objective(**settings)", str: "Objective(divergence=...)"}


def _check_tensor(name: str, value: object) -> None:
    if isinstance(value, DTensor):
        raise TypeError(
            f"{name} is a DTensor, of which each process has a part: of a head call ObjectiveHead(head, "
            "objective), around which FSDP gathers it; of the rest give .full_tensor()"
        )
    if isinstance(value, Tensor):
        return
    remedy = ""
    if isinstance(value, nn.Module):
        remedy = "; weight_and_bias(head) takes weight and bias from a head"
    elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
        remedy = "; of a model's hidden_states take the last, [-1], which is after the final norm"
    raise TypeError(f"{name} is a {type(value).__name__}: must be a tensor{remedy}")


def check_inputs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    alpha: float,
    objective: Objective,
    bias_V: Tensor | None = None,
    vocab_size: int | None = None,
    token_weights_N: Tensor | None = None,
) -> None:
    """Raise ValueError if shapes, types, devices or values of the inputs do not fit together.

    Values (NaN, infinity, labels and probabilities out of range) are checked on the CPU only: on a GPU the
    check would make every step wait for the device.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha}: must be between 0 and 1")
    if targets is None and (alpha > 0 or objective.mixing == "keep_full_kd"):
        raise ValueError(
            f"alpha {alpha}, mixing {objective.mixing}: needs teacher targets, but targets is None"
        )
    n = _check_student(hidden_ND, weight_VD, labels_N)
    rows = weight_VD.shape[0]
    vocab = rows if vocab_size is None else plain_number(vocab_size)
    if not isinstance(vocab, int) or isinstance(vocab, bool) or not 1 <= vocab <= rows:
        raise ValueError(f"vocab_size {vocab}: must be a whole number from 1 to the student's {rows} rows")
    tensors = {"hidden": hidden_ND, "weight": weight_VD, "labels": labels_N}
    tensors |= _bias("bias", bias_V, weight_VD)
    if token_weights_N is not None:
        tensors |= {"token_weights": token_weights_N}
        _check_token_weights(token_weights_N, n)
    for part, name in dense_parts(targets):
        tensors |= {f"{name}.hidden": part.hidden_NE, f"{name}.head": part.head_VE}
        tensors |= _bias(f"{name}.bias", part.bias_V, part.head_VE)
        check_dense(part, name, n, vocab, cut=vocab_size is not None)
    tensors |= headless_parts(targets)
    if isinstance(targets, LogitTargets):
        check_rows("targets.logits", targets.logits_NV, n)
        check_vocabulary(targets.logits_NV.shape[1], vocab, cut=vocab_size is not None)
    elif isinstance(targets, SparseTargets):
        check_sparse(targets, n, objective)
    _check_places(tensors)
    if hidden_ND.device.type == "cpu":
        _check_values(tensors, vocab, targets, objective)


def _check_student(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> int:
    """Check the student's shapes; return the number of tokens."""
    if weight_VD.ndim != 2:  # noqa: PLR2004 - two axes
        raise ValueError(f"weight {tuple(weight_VD.shape)}: must be [vocabulary, width], as nn.Linear has it")
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:  # noqa: PLR2004 - two axes
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}: must be [tokens, {weight_VD.shape[1]}], a row per token, as "
            f"weight {tuple(weight_VD.shape)} is [vocabulary, width]; of states per sequence, .flatten(0, 1)"
        )
    n = hidden_ND.shape[0]
    if labels_N.shape != (n,) or labels_N.dtype != torch.int64:
        raise ValueError(
            f"labels {labels_N.dtype} {tuple(labels_N.shape)}: must be int64 [{n}], one per token"
        )
    return n


def _bias(name: str, bias_V: Tensor | None, weight_VD: Tensor) -> dict[str, Tensor]:
    """The bias of a head by its name, if there is one."""
    if bias_V is None:
        return {}
    if bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(
            f"{name} {tuple(bias_V.shape)}: must be [{weight_VD.shape[0]}], one per row of its head"
        )
    return {name: bias_V}


def _check_token_weights(weights_N: Tensor, n: int) -> None:
    if weights_N.shape != (n,):
        raise ValueError(f"token_weights {tuple(weights_N.shape)}: must be [{n}], one per token")
    if weights_N.requires_grad:
        raise ValueError("token_weights: would get no gradient; give token_weights.detach()")


def _check_places(tensors: dict[str, Tensor]) -> None:
    device = tensors["hidden"].device
    if device.type == "meta":
        raise ValueError("hidden is on meta: must be on a device where tensors have values")
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {device}, where hidden is")
        if name in _IDS:
            fits, right = tensor.dtype == torch.int64, "int64"
        else:
            fits, right = tensor.dtype in _FLOATS, "float32, bfloat16, float16 or float64"
        if not fits:
            raise ValueError(f"{name} is {tensor.dtype}: must be {right}")


@torch.no_grad()
def _check_values(
    tensors: dict[str, Tensor], vocab: int, targets: Targets | None, objective: Objective
) -> None:
    for name, tensor in tensors.items():
        # The sum is not finite if an entry is not; only then is it worth looking at each.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise NotFiniteError(name, int((~tensor.isfinite()).sum()))
    labels_N = tensors["labels"]
    wrong = labels_N[(labels_N >= vocab) | ((labels_N < 0) & (labels_N != IGNORE_INDEX))]
    if wrong.numel():
        raise ValueError(
            f"labels: {int(wrong[0])} is outside the vocabulary of {vocab} ({IGNORE_INDEX} marks no label)"
        )
    if isinstance(targets, LogitTargets):
        check_logits(targets.logits_NV, labels_N)
    if not isinstance(targets, SparseTargets) or not targets.ids_NK.numel():
        return
    low, high = int(targets.ids_NK.min()), int(targets.ids_NK.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"targets.ids: {low if low < 0 else high} is outside the vocabulary of {vocab}")
    check_mass(targets, labels_N, vocab, objective)
