"""Settings that lower the memory of a run, in the order to try them, with the memory each would give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tutelage.models.memory import plan_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from tutelage.models.memory import Footprint

    Change = tuple[str, dict[str, Any]]
    """A setting as users write it, and the fields of a footprint that it changes."""

_LEVELS = ("none", "selective", "full")
_MORE = (2, 4, 8, 16, 32, 64)
"""Times as many processes that are tried."""
_CACHED_BYTES = 200.0
"""Of a token's targets in a teacher cache of the default format."""
_SMALLEST_CHUNK = 8
_WORTH = 0.97
"""Part of the memory that is left, at most, where a number is worth being changed further."""
_HALF = 2


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of settings, and the bytes on each device that the run would take with it."""

    setting: str
    bytes: float


def least_memory(needs: Footprint) -> float:
    """Bytes that a run takes at least on its mesh: all is recomputed, no state copied, hardly any logits.

    Nor is a cache counted that is to be written, for it may be there, nor what an allocator keeps unused.
    """
    least = replace(needs, recomputation="full", chunk=_SMALLEST_CHUNK, copied=False, cached=())
    return plan_memory(least).tensors


def remedies(
    needs: Footprint, sequence_length: int, memory: float, *, more_devices: bool = True
) -> Iterator[Remedy]:
    """Changes that lower the memory of a run, each on its own; then all of them together.

    Where a number is to be chosen it is the first that makes the run fit, or the last that helps.

    Args:
        needs: what the memory depends on.
        sequence_length: tokens of a sequence.
        memory: bytes that a device has.
        more_devices: whether more processes would have more memory together.
    """
    now, together, tried = plan_memory(needs).total, needs, 0
    devices = _MORE if more_devices else ()
    for setting, change in _changes(needs, sequence_length, memory, devices):
        found = plan_memory(replace(needs, **change)).total
        if found < now:
            together, tried = replace(together, **change), tried + 1
            yield Remedy(setting, found)
    if tried > 1:
        yield Remedy("all of these", plan_memory(together).total)


def _changes(needs: Footprint, length: int, memory: float, devices: Sequence[int]) -> Iterator[Change]:
    if needs.others:
        yield "one run after the other", {"others": 0}
    micro, passes = needs.micro_batch, needs.micro_batches
    parts = [n for n in range(2, micro // length + 1) if micro // length % n == 0]
    smaller = [
        (f"micro_batch_tokens={micro // n}", {"micro_batch": micro // n, "micro_batches": n * passes})
        for n in parts
    ]
    yield from _first_fitting(needs, smaller, memory)
    for level in _LEVELS[_LEVELS.index(needs.recomputation) + 1 :]:
        yield f"runtime.activation_checkpointing={level}", {"recomputation": level}
    if needs.meshed and not needs.reshard:
        yield "parallel.reshard_after_forward=true", {"reshard": True}
    processes = needs.replicate * needs.shards
    if needs.replicate > 1:
        yield "parallel.replicate=1", {"replicate": 1, "shards": processes}
    more = [(f"{n * processes} processes, one per device", _shared(needs, n)) for n in devices]
    yield from _first_fitting(needs, more, memory)
    yield from _of_teacher(needs)
    yield "checkpoint.asynchronous=false", {"copied": False}
    if not needs.half:
        yield "dtype=bfloat16", {"half": True}
    chunk = max(_SMALLEST_CHUNK, needs.chunk // 4)
    yield f"objective.chunk_tokens={chunk}", {"chunk": chunk}


def _shared(needs: Footprint, times: int) -> dict[str, Any]:
    """What several times as many processes change: each has its part of the weights and of the batch."""
    divided = times if needs.teacher_shards > 1 or not needs.meshed else 1
    return {
        "shards": needs.shards * times,
        "teacher_shards": needs.teacher_shards * divided,
        "micro_batches": max(1, needs.micro_batches // times),
    }


def _of_teacher(needs: Footprint) -> Iterator[Change]:
    """What can be done about a teacher that runs beside the student, or before it."""
    if needs.cached:
        yield "tutelage teach, before and where there is room", {"cached": ()}
    if not needs.teachers:
        return
    each = "teacher" if len(needs.teachers) == 1 else "teacher.of[i]"
    if needs.meshed and needs.teacher_shards == 1:
        yield f"{each}.placement=shard", {"teacher_shards": needs.shards}
    if needs.meshed and not needs.teacher_reshards:
        yield f"{each}.reshard_after_forward=true", {"teacher_reshards": True}
    if needs.teacher_bytes > _HALF:
        yield f"{each}.dtype=bfloat16", {"teacher_bytes": _HALF}
    cached = {"teachers": (), "cached": needs.teachers, "dense": False, "mean": False}
    cached |= {"target_bytes": _CACHED_BYTES, "read_bytes": 0.0 if needs.cuda else _CACHED_BYTES}
    yield "teacher.cache={} (its targets once, from disk)", cached


def _first_fitting(needs: Footprint, changes: Sequence[Change], memory: float) -> list[Change]:
    """The first change with which a run fits, or the last that is worth it; none if there are none."""
    chosen: list[Change] = []
    least = plan_memory(needs).total
    for change in changes:
        found = plan_memory(replace(needs, **change[1])).total
        if found > _WORTH * least:
            break
        chosen, least = [change], found
        if found <= memory:
            break
    return chosen
