"""Draw pseudo-random numbers and permutations by counter: each is a pure function of a seed and a place.

No generator has a state, so any process, in any order, draws the same numbers. Only integer arithmetic of
fixed width is used: they are the same on every machine and with every library version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK_64 = 2**64 - 1
_BITS = 40
_ROUNDS = 6


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mixed(*numbers: int) -> int:
    """Mix all `numbers`, in their order, into a seed of 63 bits."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = splitmix64(splitmix64(state) ^ np.uint64(number & _MASK_64))
    return int(state[0] >> np.uint64(1))


def uniforms(seed: int, stream: int, places: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Draw uniform numbers in (0, 1), [places, draws], each a function of (seed, stream, place, draw) alone.

    They are odd multiples of 2^-41, so an integer up to 4095 can be added without rounding.

    Args:
        seed: not negative.
        stream: number of the purpose; different streams are unrelated.
        places: for example positions in a text; not negative.
        draws: numbers per place.
    """
    key = splitmix64(splitmix64(np.full(1, seed & _MASK_64, np.uint64)) ^ np.uint64(stream))
    of_places = splitmix64(splitmix64(places.astype(np.uint64)) ^ key)
    counters = of_places[:, None] + np.arange(draws).astype(np.uint64)
    bits = splitmix64(counters) >> np.uint64(64 - _BITS)
    numbers: NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-_BITS
    return numbers


def permuted(places: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map `places` by a pseudo-random permutation of range(n), without storing the permutation.

    A Feistel network permutes the numbers of an even number of bits, at least n of them; results of n
    and above are mapped again until they fall below n (cycle walking), which keeps it a permutation of
    range(n). Fewer than four passes are needed on average.

    Args:
        places: int64, each in [0, n).
        n: size of the permuted range, at least 1.
        seed: not negative; different seeds give unrelated permutations.
        epoch: not negative; different epochs give unrelated permutations.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    start = splitmix64(splitmix64(np.full(_ROUNDS, seed & _MASK_64, np.uint64)) ^ np.uint64(epoch))
    keys = splitmix64(start + np.array(range(_ROUNDS), np.uint64))

    def encrypted(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        return (left << shift) | right

    values = encrypted(places.astype(np.uint64))
    while (outside := values >= np.uint64(n)).any():
        values[outside] = encrypted(values[outside])
    return values.astype(np.int64)
