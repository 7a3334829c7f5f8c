"""Grids that stored numbers are rounded to, each with its error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOG_BITS = 16
"""Width of a code of the logarithmic grid."""
_SMALLEST = 2**LOG_BITS - 1
LARGEST_LOSS = 32.0
"""Nats. Both grids end here: p = 1.3e-14, which float32 cannot tell from 0 beside 1."""
GOLD_BITS = 10
"""Width of log p(label) in samples."""

_STEP = LARGEST_LOSS / 2**LOG_BITS
_GOLD_LEVELS = 2**GOLD_BITS - 1


def log_codes(logp: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Log-probabilities in steps of 2^-11 nats, to nearest: wrong by at most 2^-12 nats (0.025% of p).

    What lies lower than the grid, -inf included, gets its last code, -31.9995 nats.
    """
    steps = np.rint(np.clip(-logp.astype(np.float64), 0.0, LARGEST_LOSS) / _STEP)
    codes: NDArray[np.uint32] = np.minimum(steps, _SMALLEST).astype(np.uint32)
    return codes


def log_values(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Log-probabilities of codes."""
    return codes.astype(np.float32) * np.float32(-_STEP)


def mass_values(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Masses whose logarithms were coded; the last code stands for 0."""
    values: NDArray[np.float32] = np.where(codes == _SMALLEST, np.float32(0), np.exp(log_values(codes)))
    return values


def square_codes(
    values: NDArray[np.float64], levels: int, uniform: NDArray[np.float64]
) -> NDArray[np.uint32]:
    """Round values in [0, 1] to the grid (code / levels)^2, up or down by chance, right on average.

    A code stands for its square, and the chance makes the mean of the *square* equal to the value. The
    error is below 2 sqrt(x) / levels + 1 / levels^2, fine where x is small.

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
    """What codes of the grid (code / levels)^2 stand for."""
    roots = codes.astype(np.float32) / np.float32(levels)
    return roots * roots


def gold_codes(logp: NDArray[np.floating], uniform: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Log p(label) on a square grid over [0, 32) nats, right on average.

    The error at x nats is below 0.0111 sqrt(x) + 0.00004: 0.02 at 3 nats. Losses above 32 count as 32.
    """
    return square_codes(-logp.astype(np.float64) / LARGEST_LOSS, _GOLD_LEVELS, uniform)


def gold_values(codes: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Log-probabilities of gold codes."""
    return -np.float32(LARGEST_LOSS) * square_values(codes, _GOLD_LEVELS)
