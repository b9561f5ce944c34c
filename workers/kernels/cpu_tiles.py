"""The steps of a merge and of its statistics on one tile: loops so simple that LLVM makes vectors of them.

A tile is a run of a few thousand elements whose float32 rows stay in the core's own caches. Each function is
one step of :mod:`workers.kernels.reference`, one float32 operation at a time. Rows are given at the tile's
length. Values are compared, chosen and rounded by their bits.
"""

from __future__ import annotations

import numpy as np

from workers.kernels.cpu_compile import (
    Doubles,
    Floats,
    Integers,
    Records,
    Words,
    bits_of,
    float_of,
    inlined,
)
from workers.kernels.cpu_dtypes import INFINITY, MAGNITUDE, ONE, ZERO, finite_bits, not_finite, widen

# --- drop and trim ----------------------------------------------------------------------------------------


@inlined
def draw(key: np.uint64, element: int, words: Words) -> None:
    """The Philox4x32-10 words of the elements from ``element``, a multiple of 4; so is the length of ``words``."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    first = np.uint64(element) >> np.uint64(2)
    for i in range(words.size // 4):
        counter = np.uint64(first + np.uint64(i))
        x0, x1 = counter & low, counter >> half
        x2, x3 = np.uint64(0), np.uint64(0)
        k0, k1 = key & low, key >> half
        for _ in range(10):
            p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
            x0, x1 = (p1 >> half) ^ x1 ^ k0, p1 & low
            x2, x3 = (p0 >> half) ^ x3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        words[4 * i] = x0
        words[4 * i + 1] = x1
        words[4 * i + 2] = x2
        words[4 * i + 3] = x3


@inlined
def drop(row: Floats, words: Words, below: np.uint32, factor: np.float32) -> None:
    """Multiply by ``factor`` what has a word below ``below``; the rest becomes +0.0, but NaN stays."""
    for i in range(row.size):
        x = row[i]
        row[i] = x * factor if (words[i] < below) | (x != x) else ZERO  # noqa: PLR0124 - NaN


@inlined
def cut(row: Floats, threshold: np.uint32, left: int) -> int:
    """Zero the elements equal to ``threshold`` after the first ``left``; returns how many more may stay."""
    for i in range(row.size):
        if (bits_of(row[i]) & MAGNITUDE) == threshold:
            if left > 0:
                left -= 1
            else:
                row[i] = ZERO
    return left


@inlined
def lower(row: Floats, ceiling: np.uint32) -> None:
    """Zero the numbers whose magnitude bits are ``ceiling`` or more; NaN stays."""
    if ceiling <= INFINITY:
        for i in range(row.size):
            magnitude = bits_of(row[i]) & MAGNITUDE
            row[i] = ZERO if (magnitude >= ceiling) & (magnitude <= INFINITY) else row[i]


@inlined
def finish(row: Floats, threshold: np.uint32, weight: np.float32) -> None:
    """Trim, and multiply by the weight."""
    for i in range(row.size):
        x = row[i]
        row[i] = (x if (bits_of(x) & MAGNITUDE) >= threshold else ZERO) * weight


@inlined
def add_four(a: Floats, b: Floats, c: Floats, d: Floats, total: Floats) -> None:
    """Add four rows to ``total``, one after the other."""
    for i in range(total.size):
        total[i] = (((total[i] + a[i]) + b[i]) + c[i]) + d[i]


@inlined
def finish_finite(row: Floats, threshold: np.uint32, weight: np.float32, total: Floats) -> None:
    """As :func:`finish`, with NaN and infinities as zero, for a statistic."""
    for i in range(row.size):
        x = row[i]
        magnitude = bits_of(x) & MAGNITUDE
        total[i] += (x if (magnitude >= threshold) & (magnitude < INFINITY) else ZERO) * weight


@inlined
def total(flags: Words) -> np.uint32:
    """The sum."""
    found = np.uint32(0)
    for i in range(flags.size):
        found = np.uint32(found + flags[i])
    return found


@inlined
def keep(row: Floats, outcome: np.uint32, flags: Words) -> None:
    """Clear the flags of elements that are finite (``outcome`` 1) or that are not (0)."""
    for i in range(row.size):
        flags[i] &= np.uint32(not_finite(row[i]) == outcome)


# --- elect and disjoint merge -----------------------------------------------------------------------------


@inlined
def elect(total: Floats, zero_sign: int) -> None:
    """Replace sums by their signs, 1.0 or -1.0; that of zero is ``zero_sign``, NaN's is -1.0."""
    if zero_sign > 0:
        for i in range(total.size):
            total[i] = ONE if total[i] >= ZERO else -ONE
    else:
        for i in range(total.size):
            total[i] = ONE if total[i] > ZERO else -ONE


@inlined
def _share(x: np.float32, sign: np.float32, share: np.float32) -> np.float32:
    """``share`` where ``x`` has the elected sign, or is NaN; 0 where it is zero or of the other sign."""
    return ZERO if x * sign <= ZERO else share


@inlined
def agree_four(
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats,
    signs: Floats,
    shares: Floats,
    merged: Floats,
    divisors: Floats,
) -> None:
    """Add what agrees with ``signs`` in four rows to ``merged``, and their shares to ``divisors``, in order."""
    first, second, third, fourth = shares[0], shares[1], shares[2], shares[3]
    for i in range(merged.size):
        s = signs[i]
        p, q, x, y = a[i], b[i], c[i], d[i]
        merged[i] = (((merged[i] + _share(p, s, p)) + _share(q, s, q)) + _share(x, s, x)) + _share(y, s, y)
        divisors[i] = (
            ((divisors[i] + _share(p, s, first)) + _share(q, s, second)) + _share(x, s, third)
        ) + _share(y, s, fourth)


@inlined
def divide(row: Floats, divisors: Floats) -> None:
    """Divide by ``divisors``, by 1 where they are zero."""
    for i in range(row.size):
        d = divisors[i]
        row[i] /= d + (ONE if d == ZERO else ZERO)


# --- statistics -------------------------------------------------------------------------------------------


@inlined
def high_bits(row: Floats, bins: Words) -> None:
    """The high 16 magnitude bits; those of NaN and infinities are 0."""
    for i in range(row.size):
        bins[i] = finite_bits(row[i]) >> np.uint32(16)


@inlined
def low_bits(row: Floats, high: np.uint32, bins: Words) -> None:
    """The low 16 bits of the elements whose high magnitude bits are ``high``; 65536 for the others.

    Those are many, but in bfloat16 so may the wanted ones be: to count all costs less than to pick them out.
    """
    for i in range(row.size):
        magnitude = finite_bits(row[i])
        wanted = (magnitude >> np.uint32(16)) == high
        bins[i] = magnitude & np.uint32(0xFFFF) if wanted else np.uint32(0x10000)


@inlined
def count(bins: Words, table: Words) -> None:
    """Add to ``table``, shape ``[65537 * 4]``: consecutive elements to different columns.

    Elements of equal bins would else wait for each other's stores.
    """
    fours = bins.size // 4 * 4
    for i in range(0, fours, 4):
        table[np.uint64(bins[i]) * np.uint64(4)] += np.uint32(1)
        table[np.uint64(bins[i + 1]) * np.uint64(4) + np.uint64(1)] += np.uint32(1)
        table[np.uint64(bins[i + 2]) * np.uint64(4) + np.uint64(2)] += np.uint32(1)
        table[np.uint64(bins[i + 3]) * np.uint64(4) + np.uint64(3)] += np.uint32(1)
    for i in range(fours, bins.size):
        table[np.uint64(bins[i]) * np.uint64(4)] += np.uint32(1)


@inlined
def move(table: Words, counts: Integers) -> None:
    """Add the columns of ``table`` to ``counts``, shape ``[65536]``, and clear it."""
    for i in range(counts.size):
        for column in range(4):
            counts[i] += table[4 * i + column]
            table[4 * i + column] = 0


@inlined
def magnitudes(row: Floats, bits: Words) -> None:
    """The magnitude bits; those of NaN and infinities are 0."""
    for i in range(row.size):
        bits[i] = finite_bits(row[i])


@inlined
def count_from(row: Floats, pivot: np.uint32) -> np.uint32:
    """How many elements have magnitude bits of ``pivot`` or more, those of NaN and infinities being 0."""
    found = np.uint32(0)
    for i in range(row.size):
        found = np.uint32(found + np.uint32(finite_bits(row[i]) >= pivot))
    return found


@inlined
def window(row: Floats, low: np.uint32, shift: np.uint32, bins: np.uint32, into: Words) -> np.int32:
    """The bin of each element in a window from ``low`` on; at least ``bins`` for those outside. Counts those above."""
    above = np.int32(0)
    for i in range(row.size):
        beyond = np.uint32(finite_bits(row[i]) - low)  # of those below, more than any magnitude
        found = np.uint32(beyond >> shift)
        into[i] = found
        above = np.int32(above + np.int32((beyond <= MAGNITUDE) & (found >= bins)))
    return above


@inlined
def count_within(bins: Words, table: Words) -> None:
    """Count the bins that ``table`` has. Few are, so sixteen are looked at together: as one vector."""
    limit = np.uint32(table.size)
    for sixteen in range(0, bins.size, 16):
        some = np.uint32(0)
        for i in range(sixteen, sixteen + 16):
            some |= np.uint32(bins[i] < limit)
        if some != 0:
            for i in range(sixteen, sixteen + 16):
                if bins[i] < limit:
                    table[bins[i]] += np.uint32(1)


@inlined
def count_equal(row: Floats, wanted: np.uint32) -> np.uint32:
    """How many elements have these magnitude bits, those of NaN and infinities being 0."""
    found = np.uint32(0)
    for i in range(row.size):
        found = np.uint32(found + np.uint32(finite_bits(row[i]) == wanted))
    return found


@inlined
def balance(total: Floats) -> np.int32:
    """How many are above zero, less those below."""
    found = np.int32(0)
    for i in range(total.size):
        found = np.int32(found + np.int32(total[i] > ZERO) - np.int32(total[i] < ZERO))
    return found


@inlined
def finite(row: Floats) -> None:
    """Replace NaN and infinities by +0.0."""
    for i in range(row.size):
        x = row[i]
        row[i] = x if (bits_of(x) & MAGNITUDE) < INFINITY else ZERO


@inlined
def absolutes(row: Floats, into: Doubles) -> None:
    """The absolute values, in float64."""
    for i in range(row.size):
        into[i] = np.float64(float_of(np.uint32(bits_of(row[i]) & MAGNITUDE)))


@inlined
def multiply(row: Floats, other: Floats, into: Doubles) -> None:
    """The products, exact in float64."""
    for i in range(row.size):
        into[i] = np.float64(row[i]) * np.float64(other[i])


@inlined
def add(into: Doubles, values: Doubles) -> None:
    """Add ``values`` to ``into``."""
    for i in range(into.size):
        into[i] += values[i]


# --- what a term is made of -------------------------------------------------------------------------------


@inlined
def drop_drawn(term: np.void, element: int, words: Words, row: Floats, factor: np.float32) -> None:
    """Drop a term's elements from ``element`` on by their Philox words, unless all are kept."""
    below = term["keep_below"]
    if below <= 0xFFFFFFFF:
        if below > 0:
            draw(term["key"], element, words[: (row.size + 3) // 4 * 4])
        drop(row, words, np.uint32(below), factor)


@inlined
def sparse(
    places: Records, term: np.void, first: int, start: int, less: Floats, words: Words, row: Floats
) -> np.uint32:
    """A term's tile at ``start`` of a run that begins at ``first``: less the base, dropped and rescaled.

    Returns the non-finite elements of its model.
    """
    bad = widen(places[term["place"]], start, less, row)
    drop_drawn(term, first + start, words, row, term["factor"])
    return bad
