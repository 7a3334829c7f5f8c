"""Bit packing of whole numbers, and the grids that real numbers are rounded to, with the error of each."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_WIDTH = 24
"""Bits. A number this wide that begins anywhere in a byte still lies within four bytes."""


def width_of(count: int) -> int:
    """Bits that distinguish `count` values, at least 1: ceil(log2(count))."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, width: int) -> int:
    """Bytes of a column of `count` numbers."""
    return (count * width + 7) // 8


def _period(width: int) -> tuple[int, int]:
    """(numbers, bytes) after which a number begins at a byte boundary again."""
    lanes = 8 // gcd(width, 8)
    return lanes, lanes * width // 8


def pack(values: NDArray[np.integer], width: int) -> bytes:
    """Pack values in [0, 2^width) of any shape, row by row; raise ValueError if one does not fit."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 2**width:
        raise ValueError(f"{int(flat.min())} to {int(flat.max())} do not fit into {width} bits")
    lanes, size = _period(width)
    groups = -(-flat.size // lanes)
    padded = np.zeros((groups, lanes), np.uint32)
    padded.reshape(-1)[: flat.size] = flat
    packed = np.zeros((groups, size), np.uint8)
    for lane in range(lanes):
        byte, shift = divmod(lane * width, 8)
        shifted = padded[:, lane] << np.uint32(shift)
        for place in range(byte, (lane * width + width + 7) // 8):
            packed[:, place] |= (shifted >> np.uint32(8 * (place - byte))).astype(np.uint8)
    return packed.tobytes()[: packed_bytes(flat.size, width)]


def unpack(column: memoryview, count: int, width: int) -> NDArray[np.uint32]:
    """The `count` numbers of a column; raise ValueError if it has another length."""
    if len(column) != packed_bytes(count, width):
        raise ValueError(f"{len(column)} bytes: {count} numbers of {width} bits take another length")
    if not count:
        return np.empty(0, np.uint32)
    lanes, size = _period(width)
    groups = -(-count // lanes)
    padded = np.zeros(groups * size + 4, np.uint8)  # a number is read with the four bytes it begins in
    padded[: len(column)] = np.frombuffer(column, np.uint8)
    values = np.empty((groups, lanes), np.uint32)
    for lane in range(lanes):
        byte, shift = divmod(lane * width, 8)
        words = np.ndarray(groups, "<u4", padded, offset=byte, strides=(size,))
        np.right_shift(words, np.uint32(shift), out=values[:, lane])
    values &= np.uint32(2**width - 1)
    return values.reshape(-1)[:count]


def pack_rising(
    values: NDArray[np.integer], counts: NDArray[np.integer], low_bits: int, groups: int
) -> bytes:
    """Pack rows of rising numbers into two columns, smaller than `pack` does (Elias, 1974; Fano, 1971).

    The low bits are packed. The rest of a number is its group: a row of n numbers takes n + groups - 1
    bits, in which number i of group g sets bit g + i.

    Args:
        values: the rows one after the other, each rising; below groups * 2^low_bits.
        counts: numbers per row.
        low_bits: 1 to 24. Best near the bits of the range minus the logarithm of the count.
        groups: at least 1.

    Raises:
        ValueError: a number is too large.
    """
    bits = np.zeros(values.size + counts.size * (groups - 1), np.uint8)
    high = values >> low_bits
    if values.size and int(high.max()) >= groups:
        raise ValueError(f"{int(values.max())}: above {groups} groups of {2**low_bits}")
    bits[high + _first_bits(counts, groups)] = 1
    return pack(values & (2**low_bits - 1), low_bits) + np.packbits(bits, bitorder="little").tobytes()


def _first_bits(counts: NDArray[np.integer], groups: int) -> NDArray[np.int64]:
    """The bit that each number of rising rows would set if it were in group 0."""
    rows = np.repeat(np.arange(counts.size) * (groups - 1), counts)
    first: NDArray[np.int64] = rows + np.arange(rows.size)
    return first


class Columns:
    """Takes the columns of a blob one after the other."""

    def __init__(self, blob: bytes | memoryview) -> None:
        self._rest = memoryview(blob).cast("B")

    def take(self, count: int, width: int) -> NDArray[np.uint32]:
        """The next column, of `count` numbers of `width` bits; raise ValueError if the blob is too short."""
        return unpack(self._next(count, width), count, width)

    def take_rising(self, counts: NDArray[np.integer], low_bits: int, groups: int) -> NDArray[np.int64]:
        """The numbers of `pack_rising`; raise ValueError if the columns are too short or of other counts."""
        total = int(counts.sum())
        low = self.take(total, low_bits)
        n_bits = total + counts.size * (groups - 1)
        bits = np.unpackbits(np.frombuffer(self._next(n_bits, 1), np.uint8), bitorder="little")
        high = np.flatnonzero(bits.view(np.bool_))
        if high.size != total:
            raise ValueError(f"{high.size} bits are set: {total} numbers set another count")
        values: NDArray[np.int64] = (high - _first_bits(counts, groups) << low_bits) | low
        return values

    def _next(self, count: int, width: int) -> memoryview:
        size = packed_bytes(count, width)
        column, self._rest = self._rest[:size], self._rest[size:]
        return column

    def finish(self) -> None:
        """Raise ValueError if bytes are left over."""
        if len(self._rest):
            raise ValueError(f"{len(self._rest)} bytes are left over at the end")


LOG_BITS, GOLD_BITS = 16, 10
"""Bits of a log-probability of `topk`, and of log p(label) of samples."""
LARGEST_LOSS = 32.0
"""Nats. Both grids end here: p = 1.3e-14, which float32 cannot tell from 0 beside 1."""
_SMALLEST = 2**LOG_BITS - 1
_STEP = LARGEST_LOSS / 2**LOG_BITS
_GOLD_LEVELS = 2**GOLD_BITS - 1


def log_codes(logp: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Log-probabilities rounded to steps of 2^-11 nats: wrong by at most 2^-12 nats (0.025% of p).

    Values below the grid, -inf included, get its last code, -31.9995 nats.
    """
    steps = np.rint(np.clip(-logp.astype(np.float64), 0.0, LARGEST_LOSS) / _STEP)
    codes: NDArray[np.uint32] = np.minimum(steps, _SMALLEST).astype(np.uint32)
    return codes


def log_values(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Log-probabilities of codes."""
    return codes.astype(np.float32) * np.float32(-_STEP)


def square_codes(
    values: NDArray[np.float64], levels: int, uniform: NDArray[np.float64]
) -> NDArray[np.uint32]:
    """Round values in [0, 1] to the grid (code / levels)^2, up or down at random, without bias.

    The mean of the *square* is the value. The error is below 2 sqrt(x) / levels + 1 / levels^2.

    Args:
        values: in [0, 1].
        levels: the largest code; it stands for 1.
        uniform: in (0, 1), of the shape of `values`.
    """
    scaled = np.clip(values, 0.0, 1.0) * float(levels) ** 2
    lower = np.floor(np.sqrt(scaled))
    chance = (scaled - lower**2) / (2 * lower + 1)
    codes: NDArray[np.uint32] = (lower + (uniform < chance)).astype(np.uint32)
    return codes


def square_values(codes: NDArray[np.uint32], levels: int) -> NDArray[np.float32]:
    """Values of the codes of `square_codes`."""
    roots = codes.astype(np.float32) / np.float32(levels)
    return roots * roots


def gold_codes(logp: NDArray[np.floating], uniform: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Log p(label) on a square grid over [0, 32) nats, rounded without bias.

    The error at x nats is below 0.0111 sqrt(x) + 0.00004: 0.02 at 3 nats. Losses above 32 count as 32.
    """
    return square_codes(-logp.astype(np.float64) / LARGEST_LOSS, _GOLD_LEVELS, uniform)


def gold_values(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Log-probabilities of gold codes."""
    return -np.float32(LARGEST_LOSS) * square_values(codes, _GOLD_LEVELS)
