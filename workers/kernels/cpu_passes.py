"""The compiled kernels: each one walks a run tile by tile, and takes the steps of ``cpu_tiles`` on it.

``places`` are the inputs, the base first where there is one, and then the output; ``terms`` are a formula's:
arrays of :data:`PLACE` and :data:`TERM`. A run's first element is on the grid of ``SURVEY_ELEMENTS``, of which
``TILE`` is a divisor.
"""

from __future__ import annotations

import numpy as np

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import cpu_dtypes as dtypes
from workers.kernels import cpu_tiles as tiles
from workers.kernels.cpu_compile import Floats, Integers, Kernel, Records, Words, inlined

PLACE = np.dtype([("address", "i8"), ("dtype", "i8"), ("width", "i8")], align=True)
"""Where elements are: the address of the first, the code of their dtype, and bytes an element."""

TERM = np.dtype(
    [
        ("place", "i8"), ("key", "u8"), ("keep_below", "i8"), ("threshold", "i8"),
        ("ceiling", "i8"), ("cut_block", "i8"), ("take", "i8"), ("factor", "f4"), ("weight", "f4"), ("share", "f4"),
        ("statistic", "i8"),
    ],
    align=True,
)  # fmt: skip
"""A :class:`workers.kernels.base.Term`: ``place`` of its model or statistic, ``cut_block`` -1 for no cut, ``share`` in
a divisor, ``statistic`` 1 for what is no difference to the base."""

TILE = 1 << 10
"""Elements of a tile: a few rows of them stay in the first-level cache."""

PIECE = 1 << 6
"""Elements of a sample that lie together."""

INFINITY_BITS = 0x7F800000
"""A ceiling above it lowers nothing."""

BINS = 1 << 16
COLUMNS = 4
"""Of a table that counts; see ``tiles.count``."""

_PAD = 32
"""Floats between rows, so that they do not all fall into the same sets of the cache."""

OUTSIDE = np.uint32(0xFFFFFFFF)

_ZERO, _MINUS_ZERO = np.float32(0.0), np.float32(-0.0)

ZEROS, MINUS_ZEROS, BASE, TOTAL, MERGED, DIVISORS, TERMS = range(7)


@inlined
def rows_for(terms: int, numel: int) -> Floats:
    """Rows of a tile's width: +0.0, which subtracts nothing; -0.0, which adds nothing; working rows; the terms'."""
    width = (min(numel, TILE) + 15) // 16 * 16 + _PAD
    floats = np.empty((TERMS + terms) * width + 16, np.float32)
    aligned = (64 - floats.ctypes.data % 64) % 64 // 4
    rows = floats[aligned : aligned + (TERMS + terms) * width].reshape(TERMS + terms, width)
    rows[ZEROS] = _ZERO
    rows[MINUS_ZEROS] = _MINUS_ZERO
    return rows


@inlined
def base_tile(places: Records, task_vectors: bool, start: int, rows: Floats, size: int) -> Floats:
    """What is subtracted from every model: the base's tile, or zeros."""
    if not task_vectors:
        return rows[ZEROS, :size]
    dtypes.widen(places[0], start, rows[ZEROS, :size], rows[BASE, :size])
    return rows[BASE, :size]


@inlined
def _bare_tile(
    places: Records,
    term: np.void,
    first: int,
    start: int,
    size: int,
    task_vectors: bool,
    words: Words,
    rows: Floats,
) -> Floats:
    """A term's tile at ``start`` of a run that begins at ``first``: less the base, dropped and rescaled."""
    less = base_tile(places, task_vectors, start, rows, size)
    row = rows[TERMS, :size]
    tiles.sparse(places, term, first, start, less, words, row)
    return row


@inlined
def threshold_at(term: np.void, element: int, row: Floats, left: Integers, number: int) -> np.uint32:
    """A term's threshold in the tile at ``element``; where the cut falls, what is beyond it is zeroed."""
    threshold = np.uint32(term["threshold"])
    if term["cut_block"] >= 0:
        block = element // SURVEY_ELEMENTS
        if block > term["cut_block"]:
            return np.uint32(threshold + np.uint32(1))
        if block == term["cut_block"]:
            if element % SURVEY_ELEMENTS == 0:
                left[number] = term["take"]
            left[number] = tiles.cut(row, threshold, left[number])
    return threshold


@inlined
def _row(rows: Floats, four: int, number: int, last: int, size: int) -> Floats:
    """A row of four; after the last one -0.0, which adds nothing and agrees with nothing."""
    return rows[four + number if number <= last else MINUS_ZEROS, :size]


@inlined
def term_tile(
    places: Records,
    term: np.void,
    first: int,
    start: int,
    less: Floats,
    words: Words,
    left: Integers,
    number: int,
    row: Floats,
) -> np.uint32:
    """A term's tile: less the base, dropped, trimmed and weighted. Returns the non-finite elements of its model."""
    if term["keep_below"] > 0xFFFFFFFF and term["cut_block"] < 0 and term["ceiling"] > INFINITY_BITS:
        return dtypes.load(
            places[term["place"]], start, less, np.uint32(term["threshold"]), term["weight"], row
        )
    bad = tiles.sparse(places, term, first, start, less, words, row)
    tiles.lower(row, np.uint32(term["ceiling"]))
    threshold = threshold_at(term, first + start, row, left, number)
    tiles.finish(row, threshold, term["weight"])
    return bad


# --- merge ------------------------------------------------------------------------------------------------


@Kernel
def merge(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    zero_sign: int,
    divided: bool,
    divisor: np.float32,
    factor: np.float32,
    found: Integers,
) -> None:
    """Write a formula's elements to the last of ``places``.

    ``zero_sign`` of 0 is no election. ``found`` gets the non-finite elements of each input, then the overflowed.
    """
    inputs = places.size - 1
    rows = rows_for(terms.size if zero_sign != 0 else 4, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    bad = np.empty(inputs, np.int64)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        total = rows[TOTAL, :size]
        total[:] = _MINUS_ZERO  # to which a sum's first term is added unchanged, -0.0 too
        bad[:] = -1
        less = rows[ZEROS, :size]
        if task_vectors:
            less = rows[BASE, :size]
            bad[0] = dtypes.widen(places[0], start, rows[ZEROS, :size], less)
        for number in range(terms.size):
            term = terms[number]
            row = rows[TERMS + (number if zero_sign != 0 else number % 4), :size]
            bad[term["place"]] = term_tile(places, term, first, start, less, words, left, number, row)
            if number % 4 == 3 or number == terms.size - 1:
                at = TERMS + (number // 4 * 4 if zero_sign != 0 else 0)
                last = number % 4
                tiles.add_four(
                    rows[at, :size],
                    _row(rows, at, 1, last, size),
                    _row(rows, at, 2, last, size),
                    _row(rows, at, 3, last, size),
                    total,
                )
        merged = total
        if zero_sign != 0:
            merged = _consensus(terms, zero_sign, rows, size)
        if divided:
            for i in range(size):
                merged[i] /= divisor
        plus = less if task_vectors else rows[MINUS_ZEROS, :size]
        spoilt = dtypes.store(places[inputs], start, merged, factor, plus)
        met = 0
        for place in range(inputs):
            if bad[place] < 0:  # no term wants it: only looked at
                bad[place] = dtypes.widen(places[place], start, rows[ZEROS, :size], rows[MERGED, :size])
            found[place] += bad[place]
            met += bad[place]
        if spoilt > 0:
            found[inputs] += spoilt if met == 0 else overflowed(places, start, words, rows, size)


@inlined
def _consensus(terms: Records, zero_sign: int, rows: Floats, size: int) -> Floats:
    """Elect signs by the total, and merge what agrees."""
    signs, merged, divisors = rows[TOTAL, :size], rows[MERGED, :size], rows[DIVISORS, :size]
    tiles.elect(signs, zero_sign)
    merged[:] = _ZERO
    divisors[:] = _ZERO
    shares = np.empty(4, np.float32)
    for four in range(0, terms.size, 4):
        last = min(3, terms.size - 1 - four)
        for number in range(last + 1):
            shares[number] = terms[four + number]["share"]
        tiles.agree_four(
            rows[TERMS + four, :size],
            _row(rows, TERMS + four, 1, last, size),
            _row(rows, TERMS + four, 2, last, size),
            _row(rows, TERMS + four, 3, last, size),
            signs,
            shares,
            merged,
            divisors,
        )
    tiles.divide(merged, divisors)
    return merged


@inlined
def overflowed(places: Records, start: int, words: Words, rows: Floats, size: int) -> int:
    """Outputs of a tile that are not finite though all inputs of theirs are."""
    row = rows[TOTAL, :size]
    spoilt = words[:size]
    spoilt[:] = 1
    for place in range(places.size):
        dtypes.widen(places[place], start, rows[ZEROS, :size], row)
        tiles.keep(row, np.uint32(place == places.size - 1), spoilt)
    return int(tiles.total(spoilt))


@Kernel
def nonfinite(places: Records, numel: int, found: Integers) -> None:
    """Add the non-finite elements of each place to ``found``."""
    rows = rows_for(0, numel)
    for place in range(places.size):
        for start in range(0, numel, TILE):
            size = min(TILE, numel - start)
            found[place] += dtypes.widen(places[place], start, rows[ZEROS, :size], rows[TOTAL, :size])


# --- statistics -------------------------------------------------------------------------------------------


@Kernel
def histogram(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    high: Integers,
    counts: Integers,
) -> None:
    """Count the high 16 bits of each term, or where ``high`` is not negative, the low ones within that bin."""
    rows = rows_for(1, numel)
    words = np.zeros(TILE, np.uint32)
    table = np.zeros((BINS + 1) * COLUMNS, np.uint32)
    for number in range(terms.size):
        for start in range(0, numel, TILE):
            size = min(TILE, numel - start)
            row = _bare_tile(places, terms[number], first, start, size, task_vectors, words, rows)
            if high[number] < 0:
                tiles.high_bits(row, words[:size])
            else:
                tiles.low_bits(row, np.uint32(high[number]), words[:size])
            tiles.count(words[:size], table)
        tiles.move(table, counts[number])


@Kernel
def magnitudes(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    starts: Integers,
    bits: Words,
) -> None:
    """Write the magnitude bits of one term's pieces from each of ``starts`` on, one piece after the other."""
    rows = rows_for(1, PIECE)
    words = np.zeros(PIECE, np.uint32)
    written = 0
    for start in starts:
        size = min(PIECE, numel - start)
        row = _bare_tile(places, terms[0], first, start, size, task_vectors, words, rows)
        tiles.magnitudes(row, bits[written : written + size])
        written += size


@Kernel
def count_from(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    pivots: Words,
    counts: Integers,
) -> None:
    """Count one term's magnitude bits that are at least as large as each of ``pivots``."""
    rows = rows_for(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        row = _bare_tile(places, terms[0], first, start, size, task_vectors, words, rows)
        for number in range(pivots.size):
            counts[number] += tiles.count_from(row, pivots[number])


@Kernel
def window(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    low: int,
    shift: int,
    table: Words,
    above: Integers,
) -> None:
    """Count one term's magnitude bits within a window of ``workers.kernels.ranks``, and those above it."""
    rows = rows_for(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        row = _bare_tile(places, terms[0], first, start, size, task_vectors, words, rows)
        bins = words[: (size + 15) // 16 * 16]
        bins[size:] = OUTSIDE
        above[0] += tiles.window(row, np.uint32(low), np.uint32(shift), np.uint32(table.size), bins)
        tiles.count_within(bins, table)


@Kernel
def equal_counts(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    thresholds: Integers,
    counts: Integers,
) -> None:
    """Count, per block and term, the elements of these magnitude bits."""
    rows = rows_for(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = base_tile(places, task_vectors, start, rows, size)
        for number in range(terms.size):
            row = rows[TERMS, :size]
            tiles.sparse(places, terms[number], first, start, less, words, row)
            equal = tiles.count_equal(row, np.uint32(thresholds[number]))
            counts[start // SURVEY_ELEMENTS, number] += equal


@Kernel
def elected(
    places: Records, terms: Records, first: int, numel: int, task_vectors: bool, found: Integers
) -> None:
    """Add the elements whose weighted sum is above zero, less those below, to ``found``."""
    rows = rows_for(1, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = base_tile(places, task_vectors, start, rows, size)
        total = rows[TOTAL, :size]
        total[:] = _MINUS_ZERO
        for number in range(terms.size):
            row = rows[TERMS, :size]
            tiles.sparse(places, terms[number], first, start, less, words, row)
            tiles.lower(row, np.uint32(terms[number]["ceiling"]))
            threshold = threshold_at(terms[number], first + start, row, left, number)
            tiles.finish_finite(row, threshold, terms[number]["weight"], total)
        found[0] += tiles.balance(total)
