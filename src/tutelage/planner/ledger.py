"""What ways to train a student cost: operations, hours, money, and bytes of cached targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tutelage.config.teacher_config import HiddenFormat, MinVarianceFormat
from tutelage.errors import UserError, lookup
from tutelage.models.devices import DEVICES, Hardware
from tutelage.study.cache_cost import kept_bytes

if TYPE_CHECKING:
    from tutelage.planner.candidates import Candidate

SWEEP = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Alphas of a sweep, the paper's without .5."""
_READING = 1.075
"""Time of a step that reads cached targets, as a multiple of one without a teacher: 1.05 to 1.10."""


@dataclass(frozen=True, slots=True)
class Expense:
    """One way to come by a student.

    Attributes:
        way: number of runs, and where the teacher's targets come from.
        teacher_training: FLOPs that are still to be spent on the teacher.
        teacher_forward: FLOPs of the teacher's forward passes.
        student: FLOPs of the student or students.
        seconds: on the hardware, at the usual part of its peak.
        price: of that; None where no price was given.
        cache_bytes: on disk, at most.
    """

    way: str
    teacher_training: float
    teacher_forward: float
    student: float
    seconds: float
    price: float | None
    cache_bytes: float

    @property
    def flops(self) -> float:
        """Of everything."""
        return self.teacher_training + self.teacher_forward + self.student


@dataclass(frozen=True, slots=True)
class Prices:
    """What operations cost.

    Attributes:
        hardware: devices.
        price: of a device for an hour; None: not known.
    """

    hardware: Hardware
    price: float | None

    def cost(
        self, way: str, *, training: float, forward: float, student: float, cached: float = 0.0
    ) -> Expense:
        """Price one way to train."""
        device = self.hardware.device
        work = training + forward + student * (_READING if cached else 1.0)
        seconds = work / (self.hardware.devices * device.peak_flops * device.mfu)
        price = None if self.price is None else seconds / 3600 * self.hardware.devices * self.price
        return Expense(way, training, forward, student, seconds, price, cached)


def find_hardware(text: str) -> Hardware:
    """Read `h100x8`, or `h100` for one.

    Raises:
        UserError: the device is unknown, or the number is none.
    """
    if text in DEVICES:
        return Hardware.named(text, 1)
    name, times, count = text.rpartition("x")
    if not times or not name:
        lookup(DEVICES, text, "--hardware: the device")
    lookup(DEVICES, name, "--hardware: the device")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"--hardware {text}: write how many, such as {name}x8")
    return Hardware.named(name, int(count))


def cache_format(vocab_size: int, width: int) -> tuple[MinVarianceFormat | HiddenFormat, float]:
    """The smaller of two formats that lose next to nothing, and its bytes per token at most.

    Sampled ids with least variance give the whole distribution's gradient in the mean; int8 hidden states
    give it up to rounding, and are smaller for narrow teachers.
    """
    formats = MinVarianceFormat(ids=min(16, vocab_size)), HiddenFormat(kind="hidden", dtype="int8")
    sizes = [(kept_bytes(one, vocab_size, width), one) for one in formats]
    size, best = min(sizes, key=lambda pair: pair[0])
    return best, size


def ways(
    teacher: Candidate, student_flops: float, tokens: int, text_tokens: int, vocab_size: int, prices: Prices
) -> list[Expense]:
    """One run or a sweep, with the teacher beside the student or its targets from a cache.

    Args:
        teacher: whose training and forward passes are counted.
        student_flops: of the student per token, forward and backward.
        tokens: of each run.
        text_tokens: of the training text, all of which a cache covers.
        vocab_size: of both.
        prices: of operations.
    """
    _, size = cache_format(vocab_size, teacher.width)
    return [
        prices.cost(
            f"{runs} {'cached' if cached else 'online'}",
            training=teacher.training_flops,
            forward=teacher.forward_flops * (text_tokens if cached else tokens * runs),
            student=student_flops * tokens * runs,
            cached=size * text_tokens if cached else 0.0,
        )
        for runs in (1, len(SWEEP))
        for cached in (False, True)
    ]
