"""Parts of memory together, and those that teachers take. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tutelage.models.flops import parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tutelage.models.shapes import ModelShape

Recomputation = Literal["none", "selective", "full"]

_FLOAT = 4
_UNUSED: dict[Recomputation, float] = {"none": 0.3, "selective": 0.3, "full": 1.0}
"""What the allocator of the C library (glibc's) keeps unused beside each byte in use, by recomputation: real
runs took an eighth to a third more than their tensors, with whole layers recomputed as much again."""
CACHED_TOKENS, _CODECS_BLOCKS, _CODECS_BYTES = 4096, 6, {True: 256 * 2**20, False: 32 * 2**20}
"""Tokens of a batch whose targets are written to a cache; of the logits that are formed of it at a time the
bytes, on CUDA or not, and how many blocks of that size there are with temporaries."""


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
        cls, parts: Mapping[str, float], moment: str, recomputation: Recomputation = "none", *, cuda: bool
    ) -> MemoryPlan:
        """The parts that are not 0, and on a CPU what the allocator keeps unused beside them."""
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


def writing_parts(
    teachers: Sequence[ModelShape], vocab_size: int, tokens: int, size: int, *, eager: int, cuda: bool
) -> dict[str, float]:
    """Bytes by part while a cache of targets is written, by one process or several with whole teachers each.

    Args:
        teachers: of which the targets are a mean, or one.
        vocab_size: entries of the token store.
        tokens: of a batch.
        size: bytes of a weight, and of a value in the forward pass.
        eager: tokens of a sequence if attention forms the weights of all pairs, else 0.
        cuda: whether it is done on CUDA.
    """
    taught = sum(parameters(teacher, vocab_size).total for teacher in teachers)
    per_token, left = of_teachers_token(teachers, size, eager)
    block = min(_CODECS_BYTES[cuda], _FLOAT * tokens * vocab_size)
    return {
        "teacher": float(size * taught),
        "activations": float(tokens * (per_token + left)),
        "cache": float(_CODECS_BLOCKS * block),
    }


def of_teachers_token(teachers: Sequence[ModelShape], size: int, eager: int) -> tuple[float, float]:
    """Bytes of a token while the largest teacher runs; of the states that the others have left."""
    each = [
        max(size * 3 * one.mlp, 2 * _FLOAT * one.heads * eager) + size * 3 * one.hidden for one in teachers
    ]
    return max(each), size * sum(one.hidden for one in teachers[:-1])
