"""Memory of models that run without gradients, by formula and by part, and the plan that parts make.

A teacher whose targets are written to a cache, and a model that is scored, hold their weights, what passes
between the layers of one batch, and blocks of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tutelage.models.directory import hub_config, is_local, read_config
from tutelage.models.flops import parameters, shape_of
from tutelage.models.shapes import read_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.models.devices import Hardware
    from tutelage.models.shapes import ModelShape

Recomputation = Literal["none", "selective", "full"]

_GB = 1e9
_FLOAT = 4
_UNUSED: dict[Recomputation, float] = {"none": 0.3, "selective": 0.3, "full": 0.85}
"""What the allocator of the C library (glibc's) keeps unused beside each byte in use, by recomputation: real
runs took an eighth to a third more than their tensors, with whole layers recomputed .6 to 1.2 more, .83 in
the mean of 26 starts of one."""
_CODECS_BLOCKS, _CODECS_BYTES = 6, {True: 256 * 2**20, False: 32 * 2**20}
"""Of the logits that are formed of a batch at a time where a cache is written: how many blocks of that size
there are with temporaries; and their bytes, on CUDA or not."""
_SCORED_BLOCKS = 3
"""Blocks of logits that stand together where a model is scored: these, the sampled rows, those at a power."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on each device by part, when the most is needed.

    Attributes:
        parts: by name, largest first; none of them is 0.
        moment: when that is.
    """

    parts: dict[str, float]
    moment: str

    @classmethod
    def of(
        cls, parts: Mapping[str, float], moment: str, *, cuda: bool, recomputation: Recomputation = "none"
    ) -> MemoryPlan:
        """The plan of some parts; off CUDA with what the allocator keeps unused beside them."""
        there = {name: float(size) for name, size in parts.items() if size}
        if not cuda:
            there["allocator"] = _UNUSED[recomputation] * sum(there.values())
        return cls(dict(sorted(there.items(), key=lambda item: -item[1])), moment)

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> float:
        """Bytes of all parts but what the allocator keeps unused."""
        return self.total - self.parts.get("allocator", 0.0)

    def lines(self, hardware: Hardware) -> list[str]:
        """The table of memory on each device, with a verdict."""
        has = hardware.memory
        verdict = "fits" if self.total <= has else f"{(self.total - has) / _GB:.2f} GB too much"
        lines = [f"{name:<18}{size / _GB:>9.2f} GB" for name, size in self.parts.items()]
        lines.append(
            f"{'each device':<18}{self.total / _GB:>9.2f} GB of {has / _GB:.2f} GB ({hardware.name}): "
            f"{verdict}; most during the {self.moment}"
        )
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """What the memory of models depends on that run one after the other on the same batch.

    Attributes:
        shapes: of the models.
        vocab_size: rows of their heads.
        tokens: of a batch.
        bytes: of one of their weights, and of a value in their forward pass.
        eager: tokens of a sequence if attention forms the weights of all pairs, else 0.
        cuda: whether they run on CUDA.
    """

    shapes: Sequence[ModelShape]
    vocab_size: int
    tokens: int
    bytes: int
    eager: int = 0
    cuda: bool = False

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return float(self.bytes * sum(parameters(one, self.vocab_size).total for one in self.shapes))


def token_bytes(shapes: Sequence[ModelShape], size: int, eager: int) -> int:
    """Bytes of a token while the largest model runs, with the states that those before have left.

    Args:
        shapes: of the models.
        size: bytes of a value.
        eager: as in `ForwardPass`.
    """
    each = [max(size * 3 * one.mlp, 2 * _FLOAT * one.heads * eager) + size * 3 * one.hidden for one in shapes]
    return max(each) + size * sum(one.hidden for one in shapes[:-1])


def writing_parts(run: ForwardPass) -> dict[str, float]:
    """Parts while teachers' targets are written to a cache."""
    block = min(_CODECS_BYTES[run.cuda], _FLOAT * run.tokens * run.vocab_size)
    return {
        "teacher": run.weights,
        "activations": float(run.tokens * token_bytes(run.shapes, run.bytes, run.eager)),
        "cache": float(_CODECS_BLOCKS * block),
    }


def scoring_parts(run: ForwardPass, rows: int) -> dict[str, float]:
    """Parts while a model is scored, which forms `rows` rows of logits at a time."""
    return {
        "weights": run.weights,
        "activations": float(run.tokens * token_bytes(run.shapes, run.bytes, run.eager)),
        "logits": float(_SCORED_BLOCKS * _FLOAT * rows * run.vocab_size),
    }


def may_not_fit(what: str, parts: Mapping[str, float], moment: str, hardware: Hardware) -> str | None:
    """A warning, with the table, if what is about to be loaded may not fit into what is free; else None."""
    plan = MemoryPlan.of(parts, moment, cuda=hardware.cuda)
    if plan.total <= hardware.memory:
        return None
    first = f"{what}: it may need {plan.total / _GB:.2f} GB, and {hardware.memory / _GB:.2f} GB are free"
    return "\n".join([first, *plan.lines(hardware)])


def shape_at(path: str, revision: str | None) -> ModelShape | None:
    """Shape of the model at a directory or Hub name; None of a family that the plan does not know.

    Raises:
        UserError: there is no such model.
    """
    from tutelage.models.hub import outline  # noqa: PLC0415 - loads torch, which shapes do without

    settings = read_config(Path(path)) if is_local(path) else hub_config(path, revision)
    described = read_shape(settings, path)
    return None if described is None else shape_of(described, outline(path, settings))
