"""Philox4x32-10 in numpy's uint64, where no product wraps: what the masks that are drawn in torch are held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""32-bit words."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def numpy_philox4x32(
    counter: tuple[Words, Words, Words, Words], key: int
) -> tuple[Words, Words, Words, Words]:
    """The four output words of each counter, whose own four words are given lowest first."""
    x0, x1, x2, x3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _HALF) ^ x1 ^ np.uint64(k0), p1 & _LOW
        x2, x3 = (p0 >> _HALF) ^ x3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def numpy_words(key: int, first: int, count: int) -> Words:
    """The words of the flat elements ``[first, first + count)``."""
    counters = np.arange(first // 4, -(-(first + count) // 4), dtype=np.uint64)
    zeros = np.zeros_like(counters)
    words = numpy_philox4x32((counters & _LOW, counters >> _HALF, zeros, zeros), key)
    found: Words = np.stack(words, axis=1).reshape(-1)[first % 4 :][:count]
    return found
