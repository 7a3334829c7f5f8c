"""Checkpoints that resume a run bitwise: weights and optimizer moments as safetensors, counters as JSON.

No random state is kept, because dropout is a function of seed, step and rank.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tutelage.errors import UserError
from tutelage.files import atomic_directory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

BRANCH_POINT = "branch-point-"
"""Prefix of the checkpoint that longer runs start from."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Progress of a run, and the memory of what adapts to it.

    Attributes:
        step: optimizer steps taken.
        seconds: training time over all sessions of this run.
        teacher_tokens: tokens the teacher has been run on.
        policy: what the alpha policy remembers.
        gate: what the per-token gate remembers.
    """

    step: int = 0
    seconds: float = 0.0
    teacher_tokens: int = 0
    policy: dict[str, float] = field(default_factory=dict)
    gate: dict[str, float] = field(default_factory=dict)


def save(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters, keep: int
) -> None:
    """Write `directory/step-N` and remove all but the newest `keep` checkpoints."""
    _write(directory / _name(counters), model, optimizer, counters)
    for old in _all(directory)[:-keep]:
        shutil.rmtree(old)


def save_branch_point(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters
) -> None:
    """Write `directory/branch-point-step-N`, which is kept: longer runs start from it."""
    _write(directory / f"{BRANCH_POINT}{_name(counters)}", model, optimizer, counters)


def _name(counters: Counters) -> str:
    return f"step-{counters.step:09d}"


def _write(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters) -> None:
    """Write a checkpoint as one directory, which appears when it is complete."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    with atomic_directory(path) as partial:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors"
        )
        (partial / "counters.json").write_text(json.dumps(asdict(counters)), encoding="utf-8")


def load_latest(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Counters:
    """Restore the newest checkpoint in place; without one, leave everything as it is.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    found = _all(directory)
    if not found:
        return Counters()
    path = found[-1] / "state.safetensors"
    try:
        tensors = load_file(path)
        counters = Counters(**json.loads((found[-1] / "counters.json").read_text(encoding="utf-8")))
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"model.{name}"])
            if any(f"optimizer.{key}.{name}" in tensors for key in _MOMENTS):  # else it had no gradient yet
                optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in _MOMENTS
                }
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be resumed from ({reason}); remove {found[-1]} to resume from an earlier one"
        ) from None
    return counters


def _all(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"))
