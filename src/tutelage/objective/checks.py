"""Checks of the inputs of the objective; every message has the argument, its value and the remedy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutelage.config.base import plain_number
from tutelage.config.objective_config import Objective
from tutelage.objective.gates import Gate, Random
from tutelage.types import (
    IGNORE_INDEX,
    DenseTargets,
    LogitTargets,
    LogitTransform,
    MeanTargets,
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


_MASS_TOLERANCE = 1e-3
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
    for part, name in _dense_parts(targets):
        named |= {f"{name}.hidden_NE": part.hidden_NE, f"{name}.head_VE": part.head_VE}
        optional |= {f"{name}.bias": part.bias_V}
    if targets is not None and not isinstance(targets, Targets):
        raise TypeError(
            f"targets is a {type(targets).__name__}: give LogitTargets(logits), DenseTargets(hidden states, "
            "head weight), MeanTargets of several DenseTargets, SparseTargets(ids, probabilities, ...), or "
            "None without a teacher"
        )
    named |= _headless_parts(targets) | {name: value for name, value in optional.items() if value is not None}
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
    own = {f"{name}.transform": part.transform for part, name in _dense_parts(targets)}
    given = {name: value for name, value in own.items() if value is not None}
    for name, value in ({"transform": transform} | given).items():
        if not isinstance(value, LogitTransform):
            raise TypeError(f"{name} is a {type(value).__name__}: give LogitTransform(scale, softcap)")


def check_gate(
    objective: Objective, gate: Gate | None, alpha: float, targets: Targets | None, labels_N: Tensor
) -> None:
    """Raise TypeError if `gate` is none, ValueError if it cannot judge these targets or route tokens."""
    if gate is not None and (isinstance(gate, type) or not isinstance(gate, Gate)):
        raise TypeError(f"gate is a {type(gate).__name__}: give make_gate(settings of a gate), or None")
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
    for part, name in _dense_parts(targets):
        tensors |= {f"{name}.hidden": part.hidden_NE, f"{name}.head": part.head_VE}
        tensors |= _bias(f"{name}.bias", part.bias_V, part.head_VE)
        _check_dense(part, name, n, vocab, cut=vocab_size is not None)
    tensors |= _headless_parts(targets)
    if isinstance(targets, LogitTargets):
        _check_rows("targets.logits", targets.logits_NV, n)
        _check_vocabulary(targets.logits_NV.shape[1], vocab, cut=vocab_size is not None)
    elif isinstance(targets, SparseTargets):
        _check_sparse(targets, n, objective)
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


def _check_rows(name: str, tensor: Tensor, n: int) -> None:
    if tensor.ndim != 2 or tensor.shape[0] != n:  # noqa: PLR2004 - two axes
        raise ValueError(f"{name} {tuple(tensor.shape)}: must have {n} rows, one per token")


def _check_vocabulary(teacher: int, vocab: int, *, cut: bool) -> None:
    if not cut and teacher != vocab:
        raise ValueError(
            f"teacher vocabulary {teacher}: differs from the student's, {vocab}; if one head is padded, "
            "give vocab_size, the size of the common tokenizer"
        )
    if teacher < vocab:
        raise ValueError(f"vocab_size {vocab}: above the teacher's {teacher} rows")


def _dense_parts(targets: object) -> list[tuple[DenseTargets, str]]:
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


def _headless_parts(targets: object) -> dict[str, Tensor]:
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


def _check_dense(targets: DenseTargets, name: str, n: int, vocab: int, *, cut: bool) -> None:
    _check_rows(f"{name}.hidden", targets.hidden_NE, n)
    if targets.head_VE.ndim != 2:  # noqa: PLR2004 - two axes
        raise ValueError(f"{name}.head {tuple(targets.head_VE.shape)}: must be [vocabulary, width]")
    width = targets.head_VE.shape[1]
    if targets.hidden_NE.shape[1] != width:
        raise ValueError(
            f"{name}.hidden {tuple(targets.hidden_NE.shape)}: must be [{n}, {width}] as its head"
        )
    _check_vocabulary(targets.head_VE.shape[0], vocab, cut=cut)


def _check_sparse(targets: SparseTargets, n: int, objective: Objective) -> None:
    _check_rows("targets.ids", targets.ids_NK, n)
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


def _check_values(
    tensors: dict[str, Tensor], vocab: int, targets: Targets | None, objective: Objective
) -> None:
    for name, tensor in tensors.items():
        # The sum is not finite if an entry is not; only then is it worth looking at each.
        if (
            tensor.is_floating_point()
            and not tensor.detach().sum().isfinite()
            and not tensor.isfinite().all()
        ):
            raise NotFiniteError(name, int((~tensor.isfinite()).sum()))
    labels_N = tensors["labels"]
    wrong = labels_N[(labels_N >= vocab) | ((labels_N < 0) & (labels_N != IGNORE_INDEX))]
    if wrong.numel():
        raise ValueError(
            f"labels: {int(wrong[0])} is outside the vocabulary of {vocab} ({IGNORE_INDEX} marks no label)"
        )
    if not isinstance(targets, SparseTargets) or not targets.ids_NK.numel():
        return
    low, high = int(targets.ids_NK.min()), int(targets.ids_NK.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"targets.ids: {low if low < 0 else high} is outside the vocabulary of {vocab}")
    _check_mass(targets, labels_N, vocab, objective)


def _check_mass(targets: SparseTargets, labels_N: Tensor, vocab: int, objective: Objective) -> None:
    """Check that what tokens with a label are taught are probabilities, and all of them."""
    if float(targets.probs_NK.min()) < 0 or float(targets.tail_N.min()) < 0:
        raise ValueError("targets.probs, targets.tail: must not be negative")
    if float(targets.gold_logp_N.max()) > _MASS_TOLERANCE:
        raise ValueError("targets.gold_logp: above 0; give the logarithm of the label's probability")
    if objective.tail == "none":
        return
    mass_N = targets.probs_NK.sum(-1, dtype=torch.float64) + targets.tail_N
    rounding = _MASS_TOLERANCE + 4 * torch.finfo(targets.probs_NK.dtype).eps
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
    sure_N = (targets.tail_N == 0) & (mass_N > 0) & ~all_N & (labels_N != IGNORE_INDEX)
    if sure_N.any():
        raise ValueError(
            f"targets.tail: 0 at token {int(sure_N.nonzero()[0])}, and reverse KL from a teacher who is sure "
            "is infinite; sum the tail from what was dropped, at least torch.finfo(torch.float32).tiny"
        )
