"""Products of a head, logits and gradients, in float32 whatever the dtype of the operands.

A product of bfloat16 matrices that is itself rounded to bfloat16 is off by up to .4% of each logit. Where
student and teacher nearly agree that is as large as their difference, and the gradient of the divergence,
which is this difference, is off by half. So operands may be in half precision, but results may not.

On CUDA, matrices of half precision are multiplied as they are, and their products are summed and returned in
float32 (`out_dtype`). A float32 operand beside one of half precision is rounded to it first, as autocast
does; the gradient of the logits, whose sums cancel, enters bfloat16 products as two addends that hold 16 of
its bits, stacked so that one product adds both. Elsewhere nothing is rounded: operands are brought to
float32, some rows of the head at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.types import DenseTargets, LogitTargets, MeanTargets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from tutelage.types import LogitTransform, Rows, Targets

HALVES = (torch.bfloat16, torch.float16)

UPCAST_ROWS = 4096
"""Rows of a head of half precision that stand in float32 at one time."""

_LARGEST_EXPONENT = 14
"""The gradient of logits is scaled until its largest entry is just below 2^14 before it becomes float16,
which holds 2^15 and loses bits below 2^-14: entries 2^-28 of the largest are still exact to 11 bits."""


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 if one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def weight_and_bias(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight [V, D] and the bias [V] (or None) of a linear head.

    Raises:
        ValueError: the head computes something else too, which would be silently left out: an adapter (LoRA),
            quantised weights, another layer.
    """
    if (
        not isinstance(head, nn.Linear)
        or type(head).forward is not nn.Linear.forward
        or dict(head.named_parameters()).keys() - {"weight", "bias"}
    ):
        raise ValueError(
            f"head {type(head).__module__}.{type(head).__name__}: must be a linear layer and no more; merge "
            "an adapter (LoRA) into it, or leave the head out of the adapter's target modules"
        )
    return head.weight, head.bias


@dataclass(frozen=True, slots=True)
class LogitGradient:
    """The gradient of logits, as it enters products.

    Attributes:
        addends_AV: [C, V], or [2 C, V] for two addends, one below the other.
        scale: 0-d factor of what is made of them; None for 1.
    """

    addends_AV: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadProducts:
    """A head that multiplies hidden states to logits, and gradients of logits back.

    Attributes:
        weight_VD: the head, in the dtype in which it is multiplied.
        dtype: of every result, float32 or float64.
        half: the dtype to which operands are rounded before they are multiplied; None for no rounding.
        logits_SV: memory for the logits of up to S tokens, overwritten by every call of `logits`; None: each
            call takes new memory.
    """

    weight_VD: Tensor
    dtype: torch.dtype
    half: torch.dtype | None
    logits_SV: Tensor | None = None

    @classmethod
    def of(cls, hidden_ND: Tensor, weight_VD: Tensor) -> HeadProducts:
        """The products of a head with hidden states of this dtype, on their device."""
        dtype, half = wide_dtype(hidden_ND, weight_VD), None
        halves = {hidden_ND.dtype, weight_VD.dtype} & set(HALVES)
        if hidden_ND.is_cuda and torch.version.hip is None and len(halves) == 1 and dtype == torch.float32:
            half = halves.pop()
        return cls(weight_VD if half is None else weight_VD.to(half), dtype, half)

    def keeping_logits(self, tokens: int) -> HeadProducts:
        """The same products, with one piece of memory for the logits of up to `tokens` tokens.

        New memory of this size comes from the kernel, page by page and cleared, which takes about a tenth of
        the time of the products. Only on the CPU: the allocators of other devices keep what is freed.
        """
        if self.weight_VD.device.type != "cpu" or self.half is not None:
            return self
        shape = tokens, len(self.weight_VD)
        return replace(self, logits_SV=self.weight_VD.new_empty(shape, dtype=self.dtype))

    @torch.no_grad()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """The product hidden @ weight.T, [C, V], in `logits_SV` if there is one; the caller may change it."""
        if self.half is not None:
            return self._half_product(hidden_CD.to(self.half), self.weight_VD.T)
        hidden_CD = hidden_CD.to(self.dtype)
        tokens, vocab = len(hidden_CD), len(self.weight_VD)
        memory_SV = self.logits_SV
        logits_CV = hidden_CD.new_empty((tokens, vocab)) if memory_SV is None else memory_SV[:tokens]
        if self.weight_VD.dtype == self.dtype:
            return torch.mm(hidden_CD, self.weight_VD.T, out=logits_CV)
        for rows, weight_RD in self._wide_rows():
            torch.mm(hidden_CD, weight_RD.T, out=logits_CV[:, rows])
        return logits_CV

    @torch.no_grad()
    def rounded(self, gradient_AV: Tensor) -> LogitGradient:
        """The gradient of logits for `to_hidden` and `add_to_weight`, in the dtype of their operands.

        It may come as addends in that dtype, as Triton's kernels write it.
        """
        if self.half in (None, gradient_AV.dtype):
            return LogitGradient(gradient_AV)
        return _halved(gradient_AV, self.half)

    @torch.no_grad()
    def to_hidden(self, gradient: LogitGradient) -> Tensor:
        """The product gradient @ weight, [C, D]: from the gradient of logits to that of hidden states."""
        addends_AV = gradient.addends_AV
        if self.half is not None:
            product_AD = self._half_product(addends_AV, self.weight_VD)
            if gradient.scale is not None:
                return product_AD.mul_(gradient.scale)
            high_CD, low_CD = product_AD.chunk(2)
            return high_CD.add_(low_CD)
        if self.weight_VD.dtype == self.dtype:
            return addends_AV @ self.weight_VD
        d_hidden_CD = addends_AV.new_zeros((len(addends_AV), self.weight_VD.shape[1]))
        for rows, weight_RD in self._wide_rows():
            d_hidden_CD.addmm_(addends_AV[:, rows], weight_RD)
        return d_hidden_CD

    @torch.no_grad()
    def add_to_weight(
        self, d_weight_VD: Tensor, gradient: LogitGradient, hidden_CD: Tensor, *, first: bool = False
    ) -> None:
        """Add gradient.T @ hidden to `d_weight_VD`, in place; the `first` overwrites what is there."""
        addends_AV = gradient.addends_AV
        if self.half is None:
            d_weight_VD.addmm_(addends_AV.T, hidden_CD.to(self.dtype), beta=0 if first else 1)
            return
        hidden_CD = hidden_CD.to(self.half)
        if gradient.scale is None:
            hidden_AD = torch.cat([hidden_CD, hidden_CD])
            _add_half_product(d_weight_VD, addends_AV.T, hidden_AD, first)
            return
        product_VD = self._half_product(addends_AV.T, hidden_CD).mul_(gradient.scale)
        if first:
            d_weight_VD.copy_(product_VD)
        else:
            d_weight_VD += product_VD

    def _wide_rows(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight_VD), UPCAST_ROWS):
            rows = slice(start, start + UPCAST_ROWS)
            yield rows, self.weight_VD[rows].to(self.dtype)

    def _half_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply two matrices in `half` to float32. On the CPU, for tests, they are converted first."""
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()


@torch.library.custom_op("tutelage::add_half_product", mutates_args=("sum_MN",))
def _add_half_product(sum_MN: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """Add a product of two matrices in half precision to float32 sums; the `first` overwrites them.

    On CUDA it is summed where it lies: a product apart would be written, read and added. An operator of its
    own, since torch 2.11 cannot trace `addmm` with `out_dtype`. On the CPU, for tests, it is converted first.
    """
    beta = 0 if first else 1
    if sum_MN.is_cuda:
        torch.addmm(sum_MN, left, right, torch.float32, beta=beta, out=sum_MN)
    else:
        sum_MN.addmm_(left.float(), right.float(), beta=beta)


@_add_half_product.register_fake
def _writes_in_place(*_: object) -> None:
    """No-op: the operator returns nothing, so the compiler needs no shapes."""


def _halved(gradient_CV: Tensor, half: torch.dtype) -> LogitGradient:
    """The gradient in half precision: two addends of bfloat16, or scaled by a power of two for float16.

    bfloat16 has the range of float32 but 8 bits, and rounding errors stay where the gradient itself cancels:
    the rows of a head have a common part, which adds nothing because a gradient of logits sums to zero.
    """
    if half == torch.bfloat16:
        tokens, vocab = gradient_CV.shape
        addends_AV = gradient_CV.new_empty((2 * tokens, vocab), dtype=half)
        high_CV, low_CV = addends_AV.view(2, tokens, vocab).unbind()
        high_CV.copy_(gradient_CV)
        torch.sub(gradient_CV, high_CV, out=low_CV)
        return LogitGradient(addends_AV)
    exponent = _LARGEST_EXPONENT - torch.frexp(gradient_CV.abs().amax()).exponent
    scale = torch.ldexp(gradient_CV.new_ones(()), -exponent)
    return LogitGradient(torch.ldexp(gradient_CV, exponent).to(half), scale)


def transform_(logits: Tensor, transform: LogitTransform) -> Tensor:
    """As `tutelage.types.transformed`, in place."""
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits


def products_of(targets: Targets, tokens: int) -> tuple[HeadProducts, ...]:
    """The products of the heads of `targets` without padding, with memory for the logits of `tokens` tokens.

    Of a mean, all heads but the first share theirs: their logits are added one after the other.
    """
    parts = targets.parts if isinstance(targets, MeanTargets) else (targets,)
    heads = [
        HeadProducts.of(part.hidden_NE, part.head_VE).keeping_logits(tokens)
        for part in parts[:2]
        if isinstance(part, DenseTargets)
    ]
    for part in parts[2:]:
        assert isinstance(part, DenseTargets)  # noqa: S101 - only a mean has so many
        heads.append(replace(HeadProducts.of(part.hidden_NE, part.head_VE), logits_SV=heads[1].logits_SV))
    return tuple(heads)


@torch.no_grad()
def dense_logits(
    targets: DenseTargets | MeanTargets | LogitTargets,
    rows: Rows,
    vocab_size: int | None,
    heads: Sequence[HeadProducts] = (),
) -> Tensor:
    """Teacher logits [rows, V] of the real vocabulary, float32 or wider.

    Those of `LogitTargets` may be the caller's own memory, which must not change.

    Args:
        targets: the teacher's distributions.
        rows: which tokens.
        vocab_size: entries of the real vocabulary; None: all rows of the teacher's head.
        heads: from `products_of`, for callers who make them once.
    """
    if isinstance(targets, LogitTargets):
        logits_NV = targets.logits_NV[rows, :vocab_size]
        return logits_NV.to(wide_dtype(logits_NV))
    if isinstance(targets, DenseTargets):
        return _logits_of_head(targets, rows, vocab_size, heads[0] if heads else None)
    vocab_size = targets.rows_of_head if vocab_size is None else vocab_size
    total_NV: Tensor | None = None
    known: Sequence[HeadProducts | None] = heads or [None] * len(targets.parts)
    for part, head in zip(targets.parts, known, strict=True):
        logits_NV = _logits_of_head(part, rows, vocab_size, head)
        logits_NV -= logits_NV.logsumexp(-1, keepdim=True)
        # Logarithms, so that a probability that all take for tiny does not become 0.
        if total_NV is None:
            total_NV = logits_NV
        else:
            torch.logaddexp(total_NV, logits_NV.to(total_NV.dtype), out=total_NV)
    assert total_NV is not None  # noqa: S101 - a mean has parts
    return total_NV.sub_(math.log(len(targets.parts)))


def _logits_of_head(
    targets: DenseTargets, rows: Rows, vocab_size: int | None, head: HeadProducts | None
) -> Tensor:
    if head is None:
        head = HeadProducts.of(targets.hidden_NE, targets.head_VE[:vocab_size])
    with torch.autocast(targets.hidden_NE.device.type, enabled=False):
        logits_NV = head.logits(targets.hidden_NE[rows])
    if targets.bias_V is not None:
        logits_NV += targets.bias_V[:vocab_size]
    return logits_NV if targets.transform is None else transform_(logits_NV, targets.transform)
