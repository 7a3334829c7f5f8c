"""Skip updates whose loss or gradient is not finite: seen on the device, at every step, without waiting.

Torch's fused AdamW changes nothing, neither weights nor moments nor its own step, where `found_inf` is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from tutelage.objective.alpha import DelayedScalars
from tutelage.types import LossSums

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from tutelage.objective import NotFiniteError

_SHOWN = 4
"""Sequences of a batch that a message lists."""


@dataclass(frozen=True, slots=True)
class Skips:
    """Which updates were skipped so far.

    Attributes:
        step: the step, from 1, after which this was so.
        total: skipped steps of the run.
        in_a_row: those up to and including this step without another between; 0 if its update was made.
        loss: of the first of the newest row, per token.
        ce: its cross-entropy; where this is finite and the loss is not, the teacher's targets are not.
        grad_norm: its norm of the gradients.
        is_mine: whether the part of that loss that this process computed was not finite.
    """

    step: int
    total: int
    in_a_row: int
    loss: float
    ce: float
    grad_norm: float
    is_mine: bool

    @property
    def first(self) -> int:
        """The step, from 1, at which the newest row began."""
        return self.step - self.in_a_row + 1


class Guard:
    """Decides at every step whether the update is made, and counts on the device those that are not.

    Loss and norm are global, so every rank decides alike.

    Args:
        device: where losses are.

    Attributes:
        skipped: 1.0 if the update of the newest step was skipped, else 0.0; float32, 0-d, on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._late = device.type == "cuda"
        self._total = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)
        self._first = torch.zeros(4, device=device)
        self.skipped = torch.zeros((), device=device)
        self._arriving = DelayedScalars()
        self._step = 0

    def check(self, loss: Tensor, ce: Tensor, own_loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Say whether the update of a step is to be skipped, as `skipped` does.

        Args:
            loss: of all ranks, 0-d, per token.
            ce: cross-entropy, likewise.
            own_loss: this rank's part of the loss.
            grad_norm: norm of all gradients, before they are clipped.
        """
        values = torch.stack([loss, ce, grad_norm, own_loss])
        skip = ~values.isfinite().all()
        self._first = torch.where(skip & (self._in_a_row == 0), values, self._first)
        self._total += skip
        self._in_a_row.add_(1).mul_(skip)
        self.skipped = skip.float()
        return self.skipped

    def newest(self, step: int, *, wait: bool) -> Skips | None:
        """What is known after `step`; to be asked at every step.

        Without `wait`, a GPU is not waited for: it answers for the step before, and None after the first.
        """
        arrived, self._step = (self._arriving.read(), self._step), step
        self._arriving.send(self._total, self._in_a_row, *self._first)
        if wait or not self._late:
            arrived = self._arriving.read(), step
        values, of = arrived
        if values is None:
            return None
        total, in_a_row, loss, ce, grad_norm, own_loss = values
        return Skips(of, int(total), int(in_a_row), loss, ce, grad_norm, not math.isfinite(own_loss))

    def load(self, total: int) -> None:
        """Continue counting from a checkpoint."""
        self._total.fill_(total)


def damaged(error: NotFiniteError, inputs: Iterable[Tensor | None]) -> LossSums:
    """Sums as a GPU, which checks no inputs, would give them: not finite from where the damage begins.

    The loss has gradients, which are not finite either, so that the backward pass runs as on the other ranks.

    Args:
        error: what the objective found on the CPU.
        inputs: what it was given that may have a gradient.
    """
    loss = math.nan * torch.stack([tensor.sum() for tensor in inputs if tensor is not None]).sum()
    nan = torch.full_like(loss.detach(), math.nan)
    ce = torch.zeros_like(nan) if error.name.startswith("targets") else nan
    return LossSums(loss, ce, nan, nan, torch.zeros_like(nan))


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every weight is a finite number, of those that this process holds; waits for the device."""
    held = [p.to_local() if isinstance(p, DTensor) else p.detach() for p in parameters]
    sums = torch._foreach_norm(held, 1)  # noqa: SLF001 - of magnitudes, so that a shard may be empty
    return bool(torch.stack(sums).isfinite().all())


def advice(skips: Skips, ranks: Sequence[int], starts: Sequence[int]) -> str:
    """Say in one line which updates were skipped, on what, and what to turn.

    Args:
        skips: of the run that stops.
        ranks: those whose part of the loss was not finite; empty if only gradients were not.
        starts: where the sequences of the first such step begin, in tokens of the training split; on the
            first of `ranks`, or on rank 0.
    """
    shown = ", ".join(f"{start:,}" for start in starts[:_SHOWN])
    more = f" and {len(starts) - _SHOWN} more" if len(starts) > _SHOWN else ""
    place = f"the sequences{f' of rank {ranks[0]}' if ranks else ''} from tokens {shown}{more}"
    if math.isfinite(skips.ce) and not math.isfinite(skips.loss):
        what, remedy = "the teacher's targets are not finite", "try another dtype or teacher"
    else:
        what = f"loss is {skips.loss:.4g}, gradient norm {skips.grad_norm:.4g}"
        remedy = "lower optim.lr or optim.clip"
    return (
        f"step {skips.first}: {what}, on {place} of the training split; "
        f"the updates of steps {skips.first} to {skips.step} were skipped (runtime.max_skipped_steps); "
        f"{remedy} (what checkpoints it has are intact)"
    )
