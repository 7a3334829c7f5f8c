"""The chunked objective as one operator, so that `torch.compile` takes it whole (`fullgraph=True`).

How many chunks there are depends on the labels, and the row kernels are written by hand: there is nothing in
it for a compiler to trace or to fuse. The operator computes what `tutelage.objective.chunks` computes, from
tensors, numbers and one text; its backward pass scales the gradients that the forward pass has found.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from tutelage.config.objective_config import Objective
from tutelage.objective.checks import check_inputs
from tutelage.objective.chunks import LossCall, compute
from tutelage.objective.products import wide_dtype
from tutelage.types import (
    PLAIN,
    DenseTargets,
    LogitTargets,
    LogitTransform,
    MeanTargets,
    SparseTargets,
    Targets,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def compiled_objective(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: LossCall, wanted: list[bool]
) -> list[Tensor]:
    """Losses in the order of `LossSums` and, if asked for, those per token [6, N]; to be traced.

    Raises:
        ValueError: there is a gate, whose counts would be those of the tracing.
        TypeError: the targets are a mean of teachers.
    """
    if call.gate is not None:
        raise ValueError("gate: it counts tokens in Python; call the objective outside of torch.compile")
    if isinstance(call.targets, MeanTargets):
        raise TypeError("targets is a MeanTargets: call the objective outside of torch.compile")
    targets, teacher = call.targets, PLAIN
    kind, tensors, temperature = "none", [call.labels_N], 1.0
    if isinstance(targets, DenseTargets):
        kind, tensors, teacher = "dense", [targets.hidden_NE, targets.head_VE], targets.transform or PLAIN
        if targets.bias_V is not None:
            tensors = [*tensors, targets.bias_V]
    elif isinstance(targets, LogitTargets):
        kind, tensors = "logits", [targets.logits_NV]
    elif isinstance(targets, SparseTargets):
        kind, temperature = "sparse", targets.temperature
        tensors = [targets.ids_NK, targets.probs_NK, targets.tail_N, targets.gold_logp_N]
    _ = id(call.objective)  # the graph is then guarded by this object, which cannot change
    sums, tokens_6N, *_ = _operator(
        hidden_ND,
        weight_VD,
        bias_V,
        call.labels_N,
        call.token_weights_N,
        tensors,
        kind,
        temperature,
        [call.transform.scale, teacher.scale],
        call.transform.softcap,
        teacher.softcap,
        _text(call.objective),
        call.alpha * torch.ones((), dtype=torch.float64),  # for a number, it would be compiled per value
        call.vocab_size,
        call.per_token,
        wanted,
    )
    # Copies, since a view could not be changed in place.
    loss, *metrics = (total.clone() for total in sums)
    return [loss, *(x.detach() for x in metrics), *([tokens_6N] if call.per_token else [])]


def refuse_second_derivative() -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the objective has no second derivative; a penalty on its gradients needs "
            "a loss of plain torch"
        )


def refuse_forward_mode(inputs: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError in forward mode, in which torch takes the derivative of a custom operator for 0."""
    duals = [unpack_dual(x) for x in inputs if x is not None]  # type: ignore[no-untyped-call]
    if any(dual.tangent is not None for dual in duals):
        raise RuntimeError(
            "forward mode (torch.func.jvp, jacfwd, dual tensors): the objective has a backward pass alone; "
            "use that, or reference_objective, which is plain torch"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _text(objective: Objective) -> str:
    return objective.model_dump_json(include=set(Objective.model_fields))  # that of a run has more


@functools.lru_cache(maxsize=64)
def _objective(text: str) -> Objective:
    return Objective.model_validate_json(text)


@torch.library.custom_op("tutelage::chunked_objective", mutates_args=())
def _operator(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    token_weights_N: Tensor | None,
    tensors: list[Tensor],
    kind: str,
    temperature: float,
    scales: list[float],
    softcap: float | None,
    teacher_softcap: float | None,
    objective: str,
    alpha: Tensor,
    vocab_size: int | None,
    per_token: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [5], those per token [6, N] and gradients; what is not wanted is empty."""
    parsed, transform = _objective(objective), LogitTransform(scales[0], softcap)
    targets = _targets(kind, tensors, temperature, LogitTransform(scales[1], teacher_softcap))
    given = labels_N, targets, float(alpha), parsed
    check_inputs(hidden_ND, weight_VD, *given, bias_V, vocab_size, token_weights_N)
    call = LossCall(*given, None, transform, vocab_size, token_weights_N, per_token)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        found = compute(hidden_ND, weight_VD, bias_V, call, wanted)
    rest = (found.tokens_6N, *found.gradients)
    tokens_6N, d_hidden, d_weight, d_bias = (found.sums.new_empty(0) if x is None else x for x in rest)
    return found.sums, tokens_6N, d_hidden, d_weight, d_bias


def _targets(
    kind: str, tensors: Sequence[Tensor], temperature: float, transform: LogitTransform
) -> Targets | None:
    """The targets that `compiled_objective` took apart."""
    if kind == "dense":
        hidden_NE, head_VE, *bias = tensors
        return DenseTargets(hidden_NE, head_VE, transform, bias[0] if bias else None)
    if kind == "sparse":
        ids_NK, probs_NK, tail_N, gold_logp_N = tensors
        return SparseTargets(ids_NK, probs_NK, tail_N, gold_logp_N, temperature)
    return LogitTargets(tensors[0]) if kind == "logits" else None


@_operator.register_fake
def _shapes(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *rest: Any,  # noqa: ANN401 - the other arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and strides of the outputs, for the compiler."""
    *_, per_token, wanted = rest
    like = hidden_ND.new_empty(5, dtype=wide_dtype(hidden_ND, weight_VD))
    tokens_6N = like.new_empty(6, labels_N.shape[0]) if per_token else like.new_empty(0)
    d_hidden, d_weight, d_bias = (
        torch.empty_like(x, dtype=like.dtype) if wants and x is not None else like.new_empty(0)
        for wants, x in zip(wanted, (hidden_ND, weight_VD, bias_V), strict=True)
    )
    return like, tokens_6N, d_hidden, d_weight, d_bias


_TARGETS = 5
"""Place of the tensors of the targets among the operator's arguments."""


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401 - torch's
    """Keep the gradients that the forward pass has computed."""
    ctx.dtypes = [x.dtype if wants else None for wants, x in zip(inputs[-1], inputs[:3], strict=True)]
    ctx.targets = len(inputs[_TARGETS])
    ctx.others = len(inputs) - _TARGETS - 1
    ctx.save_for_backward(*output[2:])


def _scale(ctx: Any, grad_sums: Tensor, *_: Tensor) -> tuple[Tensor | list[None] | None, ...]:  # noqa: ANN401 - as above
    """Scale them by the gradient of the loss, and round each once, to the dtype of its input."""
    refuse_second_derivative()
    gradients = [
        None if dtype is None else (x * grad_sums[0]).to(dtype)
        for dtype, x in zip(ctx.dtypes, ctx.saved_tensors, strict=True)
    ]
    return *gradients, None, None, [None] * ctx.targets, *(None,) * ctx.others


_operator.register_autograd(_scale, setup_context=_keep)
