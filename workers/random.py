"""The counter-based generator behind DARE's masks: Philox4x32-10 (Salmon et al., SC 2011; Random123).

An element's fate depends on the seed, the model's place in the recipe, the tensor's name and the element's
flat index, and on nothing else: not on block or part sizes, workers, devices, order or retries.

Flat element ``i`` uses word ``i % 4`` of the output for the 128-bit counter ``i // 4`` (low word first).
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from workers.task import canonical_json

Words = npt.NDArray[np.uint64]
"""32-bit words, each held in 64 bits so that products do not wrap."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

_CHUNK = 1 << 14
"""Counters drawn at a time: the working arrays then stay in a core's own cache."""


def mask_key(seed: int, model_index: int, tensor_name: str) -> int:
    """The 64-bit Philox key of one model's mask for one tensor.

    It is the first 8 bytes, read big-endian, of the SHA-256 of the canonical JSON
    ``[seed, model_index, tensor_name]``. Its low 32 bits are Philox's first key word.
    """
    text = canonical_json([seed, model_index, tensor_name])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def philox4x32(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32 on many counters at once; the arrays given are overwritten.

    ``counter`` holds the four 32-bit words of each counter, lowest first, each array of shape ``[n]``;
    ``key`` is 64 bits wide. Returns the four output words, each of shape ``[n]``.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    p0, p1 = np.empty_like(x0), np.empty_like(x0)
    for _ in range(_ROUNDS):
        np.multiply(x0, _MULTIPLIERS[0], out=p0)
        np.multiply(x2, _MULTIPLIERS[1], out=p1)
        np.right_shift(p1, _HALF, out=x0)
        x0 ^= x1
        x0 ^= np.uint64(k0)
        np.right_shift(p0, _HALF, out=x2)
        x2 ^= x3
        x2 ^= np.uint64(k1)
        np.bitwise_and(p1, _LOW, out=x1)
        np.bitwise_and(p0, _LOW, out=x3)
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def keep_bound(density: float) -> int:
    """What a 32-bit word must be below for its element to be kept: ``floor(density * 2**32)``.

    ``density`` is read as the decimal that it prints as. Of 1 the bound is ``2**32``, above every word.
    """
    return min(1 << 32, int(Fraction(str(density)) * (1 << 32) // 1))


def keep_mask(key: int, first: int, count: int, density: float) -> torch.Tensor:
    """Which of the flat elements ``[first, first + count)`` a DARE mask keeps: bool, shape ``[count]``.

    An element is kept iff its 32-bit word is below :func:`keep_bound`. Density 1 keeps all and density 0 none,
    without drawing.
    """
    return words_below(key, first, count, keep_bound(density))


def words_below(key: int, first: int, count: int, bound: int) -> torch.Tensor:
    """Of which flat elements ``[first, first + count)`` the 32-bit word is below ``bound``: bool, shape ``[count]``."""
    if bound >= 1 << 32:
        return torch.ones(count, dtype=torch.bool)
    if bound <= 0:
        return torch.zeros(count, dtype=torch.bool)
    below = np.uint64(bound)
    start, stop = first // 4, -(-(first + count) // 4)
    kept = np.empty((stop - start, 4), dtype=np.bool_)
    for at in range(start, stop, _CHUNK):
        counters = np.arange(at, min(at + _CHUNK, stop), dtype=np.uint64)
        zeros = np.zeros_like(counters)
        words = philox4x32((counters & _LOW, counters >> _HALF, zeros, zeros.copy()), key)
        rows = kept[at - start : at - start + len(counters)]
        for column, word in enumerate(words):
            np.less(word, below, out=rows[:, column])
    skipped = first - 4 * start
    return torch.from_numpy(kept.reshape(-1)[skipped : skipped + count])
