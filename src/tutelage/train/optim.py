"""AdamW, its learning rate as a function of the step, and the update with clipped gradients."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from tutelage.config.run_config import OptimConfig


_NO_MATRIX = re.compile(r"bias$|norm\w*\.\w+$|A_log$|time_mix_\w+$")
"""Names of what may have several rows, one per expert or head, and multiplies no vector.

Biases (GPT-OSS, RecurrentGemma, XLNet), norms (Cohere), rates of decay (Mamba, Jamba, Kimi), mixtures of two
tokens (RWKV). Families that have them with one dimension exist of each.
"""


def adamw(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay on matrices only."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name for name, p in trained.items() if p.ndim > 1 and not _NO_MATRIX.search(name)}
    groups = [
        {
            "params": [p for name, p in trained.items() if name in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    fused = next(iter(trained.values())).device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, peak: float, step: int, steps: int, *, batch_tokens: int) -> float:
    """Learning rate of 0-based optimizer step `step` of `steps`, each of `batch_tokens`.

    Linear warm-up over the first `warmup` (steps or tokens), reaching the peak on its last step; then
    cosine down to `final_lr` of the peak on the last step, also where that is the only one left, or constant,
    or (wsd) constant and a linear decay over the last `decay` of the steps, ending at `final_lr` of the peak.
    A `decay` of 0 is none.
    """
    warmup = config.warmup_steps(steps, batch_tokens)
    if step < warmup:
        return peak * (step + 1) / warmup
    low = config.final_lr * peak
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        progress = (step - warmup) / (steps - 1 - warmup) if step < steps - 1 else 1.0
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
    divisor: Tensor,
    check: Callable[[Tensor], Tensor],
) -> Tensor:
    """Update the parameters from their gradients, which are averaged and clipped on the way and then cleared.

    Torch's fused AdamW divides gradients by `grad_scale` while it reads them, so that neither the average nor
    clipping takes a pass over them.

    Args:
        optimizer: AdamW, as `adamw` makes it.
        parameters: all that have gradients, of a sum of losses.
        lr: learning rate.
        clip: the norm of the averaged gradients is brought down to it.
        divisor: what makes averages of the sums, 0-d on the device.
        check: given the norm, returns 1.0 if nothing is to change and else 0.0, float32 on the device.

    Returns:
        The global norm of the averaged gradients before clipping.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm / divisor
    skip = check(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # As `torch.nn.utils.clip_grad_norm_` has it.
    scale = divisor * ((norm + 1e-6) / clip).clamp(min=1.0)
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = scale, skip  # type: ignore[attr-defined] # torch's names
        optimizer.step()
    elif not skip:  # the other implementations know neither, so here the device is waited for
        torch._foreach_div_(gradients, scale)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
