"""Uniform numbers by counter: Philox4x64-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

Keyed with a request's seed at the counter of an output position, it gives the number that decides that token, the same
as numpy's generator of that name would give, without making one for each.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled

_WORD = (1 << 64) - 1
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_BUMP_0, _BUMP_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
_ONE, _ZERO = np.uint64(1), np.uint64(0)
_UNUSED_BITS = np.uint64(11)  # a double has 53
_ROUNDS = 10


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides output token `position` of a request with this seed, any integer."""
    return float(uniforms([seed], [position])[0])


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of each pair."""
    low = np.array([seed & _WORD for seed in seeds], np.uint64)
    high = np.array([seed >> 64 & _WORD for seed in seeds], np.uint64)
    out = np.empty(len(seeds))
    _fill(low, high, np.array(positions, np.uint64), out)
    return out


@compiled
def _multiply(a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """High and low word of the product."""
    a_low, a_high = a & _LOW_HALF, a >> _HALF
    b_low, b_high = b & _LOW_HALF, b >> _HALF
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    carried = a_low * b_high + (middle & _LOW_HALF)
    return a_high * b_high + (middle >> _HALF) + (carried >> _HALF), a * b


@compiled
def _fill(
    low: NDArray[np.uint64], high: NDArray[np.uint64], positions: NDArray[np.uint64], out: NDArray[np.float64]
) -> None:
    for i in range(len(out)):
        key_0, key_1 = low[i], high[i]
        # numpy counts up before it draws.
        c_0, c_1, c_2, c_3 = positions[i] + _ONE, _ZERO, _ZERO, _ZERO
        for _ in range(_ROUNDS):
            high_0, low_0 = _multiply(_MULTIPLIER_0, c_0)
            high_1, low_1 = _multiply(_MULTIPLIER_1, c_2)
            c_0, c_1, c_2, c_3 = high_1 ^ c_1 ^ key_0, low_1, high_0 ^ c_3 ^ key_1, low_0
            key_0, key_1 = key_0 + _BUMP_0, key_1 + _BUMP_1
        out[i] = (c_0 >> _UNUSED_BITS) * 2.0**-53
