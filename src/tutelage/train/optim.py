"""AdamW, its learning rate as a function of the step, and the update with clipped gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from tutelage.config.run_config import OptimConfig


def adamw(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int, *, batch_tokens: int) -> float:
    """Learning rate of 0-based optimizer step `step` of `steps`, each of `batch_tokens`.

    Linear warm-up over the first `warmup` (steps or tokens), reaching the peak on its last step; then
    cosine down to `final_lr` of the peak on the last step, or constant, or (wsd) constant and a linear
    decay over the last `decay` of the steps, ending at `final_lr` of the peak. A `decay` of 0 is none.
    """
    warmup = config.warmup_steps(steps, batch_tokens)
    if step < warmup:
        return peak * (step + 1) / warmup
    low = config.final_lr * peak
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    start = config.decay_start(steps, batch_tokens)
    if step < start:
        return peak
    return peak + (low - peak) * (step - start + 1) / (steps - start)


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    lr: float,
    clip: float,
    check: Callable[[Tensor], Tensor],
) -> Tensor:
    """Update the parameters from their gradients, which are clipped before and cleared afterwards.

    Args:
        optimizer: AdamW, as `adamw` makes it.
        parameters: all that have gradients.
        lr: learning rate.
        clip: the gradients' norm is brought down to it.
        check: given the norm, returns 1.0 if nothing is to change and else 0.0, float32 on the device.

    Returns:
        The global norm of the gradients before clipping.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skip = check(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined] # torch's own name for it
        optimizer.step()
    elif not skip:  # the other implementations do not know it, so here the device is waited for
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
