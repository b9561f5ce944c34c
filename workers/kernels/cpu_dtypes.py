"""Elements in their own dtypes, and as float32: how they are read and written, a tile at a time.

Widening is exact; narrowing rounds once, to nearest even, and writes NaN canonically. Both are done on the bits,
in loops so simple that LLVM makes vectors of them on every processor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba.np.numpy_support import carray

from workers.kernels.cpu_compile import (
    Floats,
    Raw,
    bits_of,
    float_of,
    inlined,
    pointer,
    prefetch,
)

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Codes of the dtypes."""

CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

Widen = Callable[[np.unsignedinteger], np.float32]
Narrow = Callable[[np.float32], np.unsignedinteger]

MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
INFINITY = np.uint32(0x7F800000)
_NAN = np.uint32(0x7FC00000)

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
_TWO = np.float32(2.0)

_CACHE_LINE = 64


@inlined
def _widen_float32(raw: np.uint32) -> np.float32:
    return float_of(raw)


@inlined
def _widen_bfloat16(raw: np.uint16) -> np.float32:
    return float_of(np.uint32(raw) << np.uint32(16))


@inlined
def _widen_float16(raw: np.uint16) -> np.float32:
    half = np.uint32(raw)
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    # A subnormal's magnitude is an integer times 2**-24: exact, and normal in float32.
    small = bits_of(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    exponent = np.uint32(0x70 << 23) if magnitude >= 0x7C00 else np.uint32(0)
    large = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x70 << 23) + exponent)
    bits = small if magnitude < 0x400 else large
    return float_of(np.uint32(bits | ((half & np.uint32(0x8000)) << np.uint32(16))))


@inlined
def _narrow_float32(x: np.float32) -> np.uint32:
    bits = bits_of(x)
    return _NAN if (bits & MAGNITUDE) > INFINITY else bits


@inlined
def _narrow_bfloat16(x: np.float32) -> np.uint16:
    bits = bits_of(x)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16((_NAN if (bits & MAGNITUDE) > INFINITY else rounded) >> np.uint32(16))


@inlined
def _narrow_float16(x: np.float32) -> np.uint16:
    bits = bits_of(x)
    magnitude = np.uint32(bits & MAGNITUDE)
    # Added to 0.5, what is below 2**-14 is rounded by the hardware to the spacing of float16's subnormals.
    small = np.uint32(bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(126 << 23))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32((magnitude - np.uint32(0x70 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    half = small if magnitude < np.uint32(0x71 << 23) else normal
    half = half if magnitude < np.uint32(0x8F << 23) else np.uint32(0x7C00)
    half = np.uint32(half | ((bits >> np.uint32(16)) & np.uint32(0x8000)))
    return np.uint16(np.uint32(0x7E00) if magnitude > INFINITY else half)


@inlined
def not_finite(x: np.float32) -> np.uint32:
    """1 for NaN and infinities, 0 for numbers."""
    return np.uint32((bits_of(x) & INFINITY) == INFINITY)


@inlined
def finite_bits(x: np.float32) -> np.uint32:
    """The bits of ``|x|``, with NaN and infinities as zero."""
    magnitude = np.uint32(bits_of(x) & MAGNITUDE)
    return magnitude if magnitude < INFINITY else np.uint32(0)


def _loader(name: str, widen: Widen) -> Callable[[Raw, Floats, np.uint32, np.float32, Floats], np.uint32]:
    def loader(raw: Raw, less: Floats, threshold: np.uint32, weight: np.float32, row: Floats) -> np.uint32:
        bad = np.uint32(0)
        for i in range(row.size):
            x = widen(raw[i])
            bad = np.uint32(bad + not_finite(x))
            x -= less[i]
            row[i] = (x if (bits_of(x) & MAGNITUDE) >= threshold else ZERO) * weight
        return bad

    return inlined(loader, name)


_load_float32 = _loader("load_float32", _widen_float32)
_load_bfloat16 = _loader("load_bfloat16", _widen_bfloat16)
_load_float16 = _loader("load_float16", _widen_float16)


@inlined
def load(
    place: np.void, start: int, less: Floats, threshold: np.uint32, weight: np.float32, row: Floats
) -> np.uint32:
    """Widen a place's elements from ``start`` on, subtract ``less``, trim and weigh; returns the non-finite ones."""
    _ask_for_next(place, start, row.size)
    address = pointer(place["address"] + start * place["width"])
    if place["dtype"] == BFLOAT16:
        return _load_bfloat16(carray(address, (row.size,), np.uint16), less, threshold, weight, row)
    if place["dtype"] == FLOAT16:
        return _load_float16(carray(address, (row.size,), np.uint16), less, threshold, weight, row)
    return _load_float32(carray(address, (row.size,), np.uint32), less, threshold, weight, row)


@inlined
def widen(place: np.void, start: int, less: Floats, row: Floats) -> np.uint32:
    """As :func:`load`, neither trimmed nor weighed."""
    return load(place, start, less, np.uint32(0), ONE, row)


@inlined
def element(place: np.void, at: int) -> np.float32:
    """One element of a place, widened."""
    address = pointer(place["address"] + at * place["width"])
    if place["dtype"] == BFLOAT16:
        return _widen_bfloat16(carray(address, (1,), np.uint16)[0])
    if place["dtype"] == FLOAT16:
        return _widen_float16(carray(address, (1,), np.uint16)[0])
    return _widen_float32(carray(address, (1,), np.uint32)[0])


@inlined
def _ask_for_next(place: np.void, start: int, size: int) -> None:
    """Have the place's next tile fetched meanwhile: what looks ahead by itself stops at the end of every page."""
    first = place["address"] + (start + size) * place["width"]
    for line in range(first, first + size * place["width"], _CACHE_LINE):
        prefetch(line)


def _storer(name: str, narrow: Narrow, infinity: np.unsignedinteger) -> Callable[..., np.uint32]:
    def storer(raw: Raw, row: Floats, factor: np.float32, plus: Floats) -> np.uint32:
        bad = np.uint32(0)
        for i in range(row.size):
            rounded = narrow(row[i] * factor + plus[i])
            bad = np.uint32(bad + np.uint32((rounded & infinity) == infinity))
            raw[i] = rounded
        return bad

    return inlined(storer, name)


_store_float32 = _storer("store_float32", _narrow_float32, INFINITY)
_store_bfloat16 = _storer("store_bfloat16", _narrow_bfloat16, np.uint16(0x7F80))
_store_float16 = _storer("store_float16", _narrow_float16, np.uint16(0x7C00))


@inlined
def store(place: np.void, start: int, row: Floats, factor: np.float32, plus: Floats) -> np.uint32:
    """Write ``row * factor + plus`` to a place from ``start`` on, rounded; count what is not finite then."""
    address = pointer(place["address"] + start * place["width"])
    if place["dtype"] == BFLOAT16:
        return _store_bfloat16(carray(address, (row.size,), np.uint16), row, factor, plus)
    if place["dtype"] == FLOAT16:
        return _store_float16(carray(address, (row.size,), np.uint16), row, factor, plus)
    return _store_float32(carray(address, (row.size,), np.uint32), row, factor, plus)
