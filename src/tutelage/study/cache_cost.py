"""Estimate what the caches of a study take: targets of teachers that are computed once for all students."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.load import digest
from tutelage.config.teacher_config import HiddenFormat, MinVarianceFormat, TopKFormat
from tutelage.models.shapes import find_shape
from tutelage.study.given_models import given_model, teacher_forward_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tutelage.config.study_config import TeacherSpec
    from tutelage.config.teacher_config import Format


_INDEX_BYTES = 12
"""Of a context in the index of a cache."""


@dataclass(frozen=True, slots=True)
class Caches:
    """Teacher targets that are computed once for all students: FLOPs of making them, bytes at most."""

    flops: float
    bytes: float


@dataclass(slots=True)
class _Cache:
    """What one cache takes.

    Attributes:
        first: key of the run that comes first, and makes it.
        flops: of the teacher's forward pass, per token.
        bytes: on disk per token, at most.
        tokens: that it covers.
        head: bytes of the teacher's head, which stands beside hidden states.
    """

    first: str
    flops: float
    bytes: float
    tokens: int
    head: float


class CacheCosts:
    """The caches that runs of some studies read. Each covers a whole training text, and is made once."""

    def __init__(self) -> None:
        self._caches: dict[str, _Cache] = {}

    def add(
        self,
        run: str,
        recipe: object,
        teacher: TeacherSpec,
        parts: Sequence[TeacherSpec],
        *,
        tokens: int,
        length: int,
        vocab_size: int,
    ) -> None:
        """Note that a run reads a cache.

        Args:
            run: its key.
            recipe: JSON data that tells the cache, apart from its teacher and the length of sequences.
            teacher: whose targets are kept.
            parts: the teachers that it is a mean of, or itself.
            tokens: of the training text, or of the run where that is not known: the longest run counts then.
            length: of the run's sequences.
            vocab_size: of both.
        """
        if teacher.cache is None or teacher.control is not None:
            return
        dumped = [one.model_dump(mode="json") for one in (teacher, *parts)]
        key = digest([dumped, recipe, length])
        if key not in self._caches:
            given = None if teacher.model is None else given_model(teacher.model, length)
            narrow = given.width if given else 0
            width = narrow if teacher.shape is None else find_shape(teacher.shape).hidden
            flops = sum(teacher_forward_flops(one, vocab_size, length) for one in parts)
            size = kept_bytes(teacher.cache.format, vocab_size, width) + _INDEX_BYTES / length
            head = 4.0 * vocab_size * width if isinstance(teacher.cache.format, HiddenFormat) else 0.0
            self._caches[key] = _Cache(run, flops, size, tokens, head)
        self._caches[key].tokens = max(tokens, self._caches[key].tokens)

    def made_by(self) -> dict[str, float]:
        """FLOPs of the caches that runs make, by the keys of these."""
        found: dict[str, float] = {}
        for one in self._caches.values():
            found[one.first] = found.get(one.first, 0.0) + one.flops * one.tokens
        return found

    @property
    def total(self) -> Caches:
        """All of them."""
        known = self._caches.values()
        return Caches(
            sum(one.flops * one.tokens for one in known),
            sum(one.bytes * one.tokens + one.head for one in known),
        )


def kept_bytes(kept: Format, vocab_size: int, width: int) -> float:
    """Bytes per token of a cache, at most, without its index: an id takes log2 V bits, a weight two bytes.

    Beside them stand numbers of the position: log p(label), the scale of int8, the mass of a top-k's rest
    and, where top-p bounds it, how many ids it has. Samples have room for theirs: their weights are shorter.
    """
    entry = ((vocab_size - 1).bit_length() + 16) / 8
    if isinstance(kept, HiddenFormat):
        size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[kept.dtype]
        return width * size + (8 if kept.dtype == "int8" else 4)
    if isinstance(kept, TopKFormat):
        return entry * kept.k + 4 + (kept.k.bit_length() / 8 if kept.top_p < 1 else 0)
    return entry * (kept.ids if isinstance(kept, MinVarianceFormat) else kept.draws)
