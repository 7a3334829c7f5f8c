"""Objective for training: what `reference_objective` defines, in a few chunks of memory.

`tutelage.objective.chunks` does the work; here it meets autograd and modules, and `compiled` torch.compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelage.objective.checks import check_gate, check_inputs, check_types
from tutelage.objective.chunks import LossCall, compute
from tutelage.objective.compiled import compiled_objective, refuse_forward_mode, refuse_second_derivative
from tutelage.objective.products import weight_and_bias
from tutelage.types import PLAIN, LossSums, TokenLosses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tutelage.config.objective_config import Objective
    from tutelage.objective.gates import Gate
    from tutelage.types import LogitTransform, Targets


class ObjectiveHead(nn.Module):
    """Wrap a head so that a call returns its loss instead of its logits.

    FSDP2 gathers and reduces the parameters of a module around its call. With
    `fully_shard(ObjectiveHead(head, objective), reshard_after_forward=False)` the head is gathered once and
    its gradient reduced once per backward pass, however many chunks there are; the gradient is known
    after the forward pass, so there is nothing to gather again.

    Attributes:
        head: the student's output embedding, a linear layer. Not to be tied to the input embedding if this
            module is sharded on its own.
        objective: what is minimised.
        transform: what the student's family does to its logits.
        vocab_size: entries of the common vocabulary; None: all rows of the head.
    """

    def __init__(
        self,
        head: nn.Linear,
        objective: Objective,
        transform: LogitTransform = PLAIN,
        vocab_size: int | None = None,
    ) -> None:
        """Raise ValueError if the head is more than a linear layer."""
        super().__init__()
        weight_and_bias(head)
        self.head = head
        self.objective = objective
        self.transform = transform
        self.vocab_size = vocab_size

    @property
    def weight(self) -> Tensor:
        """The head's weight, by which torchtitan ties an embedding to its head."""
        return self.head.weight

    def forward(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        targets: Targets | None,
        alpha: float,
        gate: Gate | None = None,
        token_weights_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of `LossSums` in their order, as a tuple because FSDP2 finds tensors in tuples.

        Arguments and errors are those of `chunked_objective`.
        """
        weight_VD, bias_V = weight_and_bias(self.head)
        settings = self.objective, gate, bias_V, self.transform, self.vocab_size, token_weights_N
        sums = chunked_objective(hidden_ND, weight_VD, labels_N, targets, alpha, *settings)
        return sums.loss, sums.ce, sums.kd, sums.teacher_ce, sums.effective_alpha


def chunked_objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    targets: Targets | None,
    alpha: float,
    objective: Objective,
    gate: Gate | None = None,
    bias_V: Tensor | None = None,
    transform: LogitTransform = PLAIN,
    vocab_size: int | None = None,
    token_weights_N: Tensor | None = None,
    *,
    per_token: bool = False,
) -> LossSums:
    """Sum (1 - alpha) CE + alpha T^2 D(teacher || student) over tokens with a label, in chunks.

    Gradients are computed during the forward pass and scaled in the backward pass, of which there can be one.
    Logits, the loss and the sums of all gradients are float32 (or float64) whatever the dtype of the hidden
    states, also under autocast; a gradient is rounded once, to the dtype of what it belongs to
    (`tutelage.objective.products` says what a product rounds on CUDA). Nothing given is written to. Tokens
    without a label cost nothing: no head is multiplied for them; to find them, a GPU is waited for.
    `torch.compile(fullgraph=True)` takes the call as one operator.

    Args:
        hidden_ND: student hidden states after the final norm, a row per token: `.flatten(0, 1)` of [B, T, D].
        weight_VD: the weight of the student's head; `weight_and_bias(head)` takes both from it.
        labels_N: int64 next-token ids, shifted already; -100 where there is no loss.
        targets: the teacher's distributions for the same tokens, which get no gradient; None only with
            alpha 0.
        alpha: weight of the divergence, one number in [0, 1].
        objective: divergence, temperature, mixing, label smoothing, z-loss. Of the settings of a run
            (`config.objective`) alpha and gate are not read; `make_policy` and `make_gate` make what to give.
        gate: factor on alpha per token, from `make_gate`; None for 1. `mixing: routed` needs one. Call its
            `update` after each optimizer step: it moves the threshold by what the calls since have counted.
        bias_V: the bias of the student's head; None for none.
        transform: of the student's logits, applied after the head.
        vocab_size: entries of the common vocabulary; later rows of either head are padding and take no
            probability. None: all rows.
        token_weights_N: factor on the loss of each token, of any size and sign, without a gradient; None for
            1. The other sums are not weighted.
        per_token: give the losses of each token too, in `LossSums.tokens`, for one more pass over the logits.

    Returns:
        Sums in nats; divide `loss` by the number of labels that are not -100, over micro-batches and ranks.

    Raises:
        TypeError: an argument is of another kind; the message says what to give.
        ValueError: naming the argument, its value and what would be right.
    """
    check_types(hidden_ND, weight_VD, labels_N, targets, alpha, objective, bias_V, token_weights_N, transform)
    check_gate(objective, gate, alpha, targets, labels_N)
    call = LossCall(
        labels_N, targets, alpha, objective, gate, transform, vocab_size, token_weights_N, per_token
    )
    return _sums(hidden_ND, weight_VD, bias_V, call)


def _sums(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, call: LossCall) -> LossSums:
    """Compute under autograd, or as one operator where a compiler looks on."""
    inputs = hidden_ND, weight_VD, bias_V
    refuse_forward_mode(inputs)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if torch.compiler.is_compiling():
        loss, *metrics = compiled_objective(*inputs, call, wanted)
    else:
        given = call.labels_N, call.targets, call.alpha, call.objective
        check_inputs(hidden_ND, weight_VD, *given, bias_V, call.vocab_size, call.token_weights_N)
        loss, *metrics = _ChunkedObjective.apply(*inputs, call, wanted)  # type: ignore[no-untyped-call]
    ce, kd, teacher_ce, effective_alpha, *tokens = metrics
    return LossSums(
        loss, ce, kd, teacher_ce, effective_alpha, TokenLosses(*tokens[0].unbind()) if tokens else None
    )


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch hands over an object of its own
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        call: LossCall,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            found = compute(hidden_ND, weight_VD, bias_V, call, wanted)
        ctx.gradients = found.gradients
        # Copies, since a view among the outputs of a function could not be changed in place.
        loss, *metrics = (total.clone() for total in found.sums)
        if found.tokens_6N is not None:
            metrics.append(found.tokens_6N)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - as above
        grad_loss: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        # Scaled in place: a second [V, D] buffer would cost as much memory as the weight itself. Autograd
        # rounds each to the dtype of its input.
        refuse_second_derivative()
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "a second backward pass: the first handed the gradients on; call the objective again"
            )
        if grad_loss.device.type == "cpu" and grad_loss == 1:  # a pass over the head less
            return *gradients, None, None
        return *(None if x is None else x.mul_(grad_loss) for x in gradients), None, None
