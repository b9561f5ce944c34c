"""The counter-based generator behind DARE's masks: Philox4x32-10 (Salmon et al., SC 2011; Random123).

An element's fate depends on the seed, the model's place in the recipe, the tensor's name and the element's
flat index, and on nothing else: not on block or part sizes, workers, devices, order or retries.

Flat element ``i`` uses word ``i % 4`` of the output for the 128-bit counter ``i // 4`` (low word first).

Words are drawn in torch, on the device where they are used, and held in int64, since no device computes with
uint32 or uint64 throughout. A product of two words may wrap there; its 64 bits are the unsigned product's.
"""

from __future__ import annotations

import hashlib

import torch

from workers.canonical import canonical_json
from workers.kernels.scalars import keep_bound

Words = torch.Tensor
"""32-bit words as int64 from 0 to 2**32 - 1."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def mask_key(seed: int, model_index: int, tensor_name: str) -> int:
    """The 64-bit Philox key of one model's mask for one tensor.

    It is the first 8 bytes, read big-endian, of the SHA-256 of the canonical JSON
    ``[seed, model_index, tensor_name]``. Its low 32 bits are Philox's first key word.
    """
    text = canonical_json([seed, model_index, tensor_name])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def philox4x32(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32 on many counters at once.

    ``counter`` holds the four words of each counter, lowest first, each tensor of shape ``[n]``; ``key`` is
    64 bits wide. Returns the four output words, each of shape ``[n]``, on the counters' device.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = _high(p1).bitwise_xor_(x1).bitwise_xor_(k0)
        x2 = _high(p0).bitwise_xor_(x3).bitwise_xor_(k1)
        x1, x3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def _high(product: torch.Tensor) -> Words:
    """The upper 32 of 64 bits: the shift brings in copies of the sign, which are masked away."""
    return (product >> 32).bitwise_and_(_LOW)


def keep_mask(key: int, first: int, count: int, density: float) -> torch.Tensor:
    """Which of the flat elements ``[first, first + count)`` a DARE mask keeps: bool, shape ``[count]``.

    An element is kept iff its 32-bit word is below :func:`~workers.kernels.scalars.keep_bound`. Density 1 keeps all
    and density 0 none, without drawing.
    """
    return words_below(key, first, count, keep_bound(density))


def words(key: int, count: int) -> Words:
    """The 32-bit words of the flat elements ``[0, count)``: shape ``[count]``."""
    counters = torch.arange(-(-count // 4), dtype=torch.int64)
    zeros = torch.zeros_like(counters)
    drawn = philox4x32((counters & _LOW, counters >> 32, zeros, zeros), key)
    return torch.stack(drawn, dim=1).flatten()[:count]


def words_below(
    key: int, first: int, count: int, bound: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Of which flat elements ``[first, first + count)`` the 32-bit word is below ``bound``: bool, shape ``[count]``."""
    if bound >= 1 << 32:
        return torch.ones(count, dtype=torch.bool, device=device)
    if bound <= 0:
        return torch.zeros(count, dtype=torch.bool, device=device)
    start, stop = first // 4, -(-(first + count) // 4)
    counters = torch.arange(start, stop, dtype=torch.int64, device=device)
    zeros = torch.zeros_like(counters)
    below = torch.empty((stop - start, 4), dtype=torch.bool, device=device)
    words = philox4x32((counters & _LOW, counters >> 32, zeros, zeros), key)
    for column, word in enumerate(words):
        torch.lt(word, bound, out=below[:, column])
    skipped = first - 4 * start
    return below.flatten()[skipped : skipped + count]
