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
from workers.kernels.cpu_compile import Doubles, Floats, Integers, Kernel, Records, Words, inlined

PLACE = np.dtype([("address", "i8"), ("dtype", "i8"), ("width", "i8")], align=True)
"""Where elements are: the address of the first, the code of their dtype, and bytes an element."""

TERM = np.dtype(
    [
        ("place", "i8"), ("key", "u8"), ("keep_below", "i8"), ("threshold", "i8"),
        ("cut_block", "i8"), ("take", "i8"), ("factor", "f4"), ("weight", "f4"), ("share", "f4"),
    ],
    align=True,
)  # fmt: skip
"""A :class:`workers.kernels.base.Term`: ``place`` of its model, ``cut_block`` -1 for no cut, ``share`` in a divisor."""

TILE = 1 << 10
"""Elements of a tile: a few rows of them stay in the first-level cache."""

PIECE = 1 << 6
"""Elements of a sample that lie together."""

BINS = 1 << 16
COLUMNS = 4
"""Of a table that counts; see ``tiles.count``."""

_PAD = 32
"""Floats between rows, so that they do not all fall into the same sets of the cache."""

OUTSIDE = np.uint32(0xFFFFFFFF)

_ZERO, _MINUS_ZERO = np.float32(0.0), np.float32(-0.0)

_ZEROS, _MINUS_ZEROS, _BASE, _TOTAL, _MERGED, _DIVISORS, _TERMS = range(7)


@inlined
def _rows(terms: int, numel: int) -> Floats:
    """Rows of a tile's width: +0.0, which subtracts nothing; -0.0, which adds nothing; working rows; the terms'."""
    width = (min(numel, TILE) + 15) // 16 * 16 + _PAD
    floats = np.empty((_TERMS + terms) * width + 16, np.float32)
    aligned = (64 - floats.ctypes.data % 64) % 64 // 4
    rows = floats[aligned : aligned + (_TERMS + terms) * width].reshape(_TERMS + terms, width)
    rows[_ZEROS] = _ZERO
    rows[_MINUS_ZEROS] = _MINUS_ZERO
    return rows


@inlined
def _base(places: Records, task_vectors: bool, start: int, rows: Floats, size: int) -> Floats:
    """What is subtracted from every model: the base's tile, or zeros."""
    if not task_vectors:
        return rows[_ZEROS, :size]
    dtypes.widen(places[0], start, rows[_ZEROS, :size], rows[_BASE, :size])
    return rows[_BASE, :size]


@inlined
def _threshold(term: np.void, element: int, row: Floats, left: Integers, number: int) -> np.uint32:
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
    return rows[four + number if number <= last else _MINUS_ZEROS, :size]


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
    rows = _rows(terms.size if zero_sign != 0 else 4, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    bad = np.empty(inputs, np.int64)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        total = rows[_TOTAL, :size]
        total[:] = _MINUS_ZERO  # to which a sum's first term is added unchanged, -0.0 too
        bad[:] = -1
        less = rows[_ZEROS, :size]
        if task_vectors:
            less = rows[_BASE, :size]
            bad[0] = dtypes.widen(places[0], start, rows[_ZEROS, :size], less)
        for number in range(terms.size):
            term = terms[number]
            row = rows[_TERMS + (number if zero_sign != 0 else number % 4), :size]
            if term["keep_below"] > 0xFFFFFFFF and term["cut_block"] < 0:
                threshold = np.uint32(term["threshold"])
                bad[term["place"]] = dtypes.load(
                    places[term["place"]], start, less, threshold, term["weight"], row
                )
            else:
                bad[term["place"]] = tiles.sparse(places, term, first, start, less, words, row)
                threshold = _threshold(term, first + start, row, left, number)
                tiles.finish(row, threshold, term["weight"])
            if number % 4 == 3 or number == terms.size - 1:
                at = _TERMS + (number // 4 * 4 if zero_sign != 0 else 0)
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
        plus = less if task_vectors else rows[_MINUS_ZEROS, :size]
        spoilt = dtypes.store(places[inputs], start, merged, factor, plus)
        met = 0
        for place in range(inputs):
            if bad[place] < 0:  # no term wants it: only looked at
                bad[place] = dtypes.widen(places[place], start, rows[_ZEROS, :size], rows[_MERGED, :size])
            found[place] += bad[place]
            met += bad[place]
        if spoilt > 0:
            found[inputs] += spoilt if met == 0 else _overflowed(places, start, words, rows, size)


@inlined
def _consensus(terms: Records, zero_sign: int, rows: Floats, size: int) -> Floats:
    """Elect signs by the total, and merge what agrees."""
    signs, merged, divisors = rows[_TOTAL, :size], rows[_MERGED, :size], rows[_DIVISORS, :size]
    tiles.elect(signs, zero_sign)
    merged[:] = _ZERO
    divisors[:] = _ZERO
    shares = np.empty(4, np.float32)
    for four in range(0, terms.size, 4):
        last = min(3, terms.size - 1 - four)
        for number in range(last + 1):
            shares[number] = terms[four + number]["share"]
        tiles.agree_four(
            rows[_TERMS + four, :size],
            _row(rows, _TERMS + four, 1, last, size),
            _row(rows, _TERMS + four, 2, last, size),
            _row(rows, _TERMS + four, 3, last, size),
            signs,
            shares,
            merged,
            divisors,
        )
    tiles.divide(merged, divisors)
    return merged


@inlined
def _overflowed(places: Records, start: int, words: Words, rows: Floats, size: int) -> int:
    """Outputs of a tile that are not finite though all inputs of theirs are."""
    row = rows[_TOTAL, :size]
    spoilt = words[:size]
    spoilt[:] = 1
    for place in range(places.size):
        dtypes.widen(places[place], start, rows[_ZEROS, :size], row)
        tiles.keep(row, np.uint32(place == places.size - 1), spoilt)
    return int(tiles.total(spoilt))


@Kernel
def nonfinite(places: Records, numel: int, found: Integers) -> None:
    """Add the non-finite elements of each place to ``found``."""
    rows = _rows(0, numel)
    for place in range(places.size):
        for start in range(0, numel, TILE):
            size = min(TILE, numel - start)
            found[place] += dtypes.widen(places[place], start, rows[_ZEROS, :size], rows[_TOTAL, :size])


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
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    table = np.zeros((BINS + 1) * COLUMNS, np.uint32)
    for number in range(terms.size):
        for start in range(0, numel, TILE):
            size = min(TILE, numel - start)
            less = _base(places, task_vectors, start, rows, size)
            row = rows[_TERMS, :size]
            tiles.sparse(places, terms[number], first, start, less, words, row)
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
    rows = _rows(1, PIECE)
    words = np.zeros(PIECE, np.uint32)
    written = 0
    for start in starts:
        size = min(PIECE, numel - start)
        less = _base(places, task_vectors, start, rows, size)
        row = rows[_TERMS, :size]
        tiles.sparse(places, terms[0], first, start, less, words, row)
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
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = _base(places, task_vectors, start, rows, size)
        row = rows[_TERMS, :size]
        tiles.sparse(places, terms[0], first, start, less, words, row)
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
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = _base(places, task_vectors, start, rows, size)
        row = rows[_TERMS, :size]
        tiles.sparse(places, terms[0], first, start, less, words, row)
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
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = _base(places, task_vectors, start, rows, size)
        for number in range(terms.size):
            row = rows[_TERMS, :size]
            tiles.sparse(places, terms[number], first, start, less, words, row)
            equal = tiles.count_equal(row, np.uint32(thresholds[number]))
            counts[start // SURVEY_ELEMENTS, number] += equal


@Kernel
def elected(
    places: Records, terms: Records, first: int, numel: int, task_vectors: bool, found: Integers
) -> None:
    """Add the elements whose weighted sum is above zero, less those below, to ``found``."""
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        less = _base(places, task_vectors, start, rows, size)
        total = rows[_TOTAL, :size]
        total[:] = _MINUS_ZERO
        for number in range(terms.size):
            row = rows[_TERMS, :size]
            tiles.sparse(places, terms[number], first, start, less, words, row)
            threshold = _threshold(terms[number], first + start, row, left, number)
            tiles.finish_finite(row, threshold, terms[number]["weight"], total)
        found[0] += tiles.balance(total)


# --- sums by the fixed tree -------------------------------------------------------------------------------
#
# A block is padded with zeros, and its second half added to its first until one value is left. Seen as lines of
# TILE elements, lines whose numbers differ in the highest bit are added first, then those that differ in the
# next one: visited in the order of their reversed bits, neighbours are added, as a binary counter carries.

_LINES = SURVEY_ELEMENTS // TILE
_LEVELS = _LINES.bit_length()


@inlined
def _lines(size: int) -> int:
    """Lines of a block of ``size`` elements that may hold other values than zero, to a power of two."""
    lines = 1
    while lines * TILE < size:
        lines *= 2
    return lines


@inlined
def _line(visit: int, lines: int) -> int:
    """The number of the line that is visited then: its bits reversed."""
    line = 0
    while lines > 1:
        line = 2 * line + visit % 2
        visit //= 2
        lines //= 2
    return line


@inlined
def _carry(stack: Doubles, depth: int, visit: int) -> int:
    """Add up the topmost lines of the stack after a visit put one there; returns the depth that is left."""
    while visit % 2:
        tiles.add(stack[depth - 2], stack[depth - 1])
        depth -= 1
        visit //= 2
    return depth


@inlined
def _root(stack: Doubles, sums: int, lines: int, into: Doubles) -> None:
    """Sum up the line that is left, of each of ``sums`` sums."""
    for number in range(sums):
        line = stack[0, number * TILE : (number + 1) * TILE]
        width = TILE
        while width > 1:
            width //= 2
            tiles.add(line[:width], line[width : 2 * width])
        # The zeros beyond the last line were added: a sum of -0.0 is then +0.0.
        into[number] = line[0] + 0.0 if lines < _LINES else line[0]


@Kernel
def norms(places: Records, terms: Records, first: int, numel: int, task_vectors: bool, sums: Doubles) -> None:
    """The L1 norms of each term per block, before its drop and after: ``sums`` is ``[blocks, terms, 2]``."""
    rows = _rows(1, numel)
    words = np.zeros(TILE, np.uint32)
    stack = np.empty((_LEVELS + 1, 2 * TILE), np.float64)
    for block in range(sums.shape[0]):
        begin = block * SURVEY_ELEMENTS
        end = min(begin + SURVEY_ELEMENTS, numel)
        lines = _lines(end - begin)
        for number in range(terms.size):
            term = terms[number]
            depth = 0
            for visit in range(lines):
                start = begin + _line(visit, lines) * TILE
                size = max(0, min(TILE, end - start))
                line = stack[depth]
                depth += 1
                line[:] = 0.0
                if size > 0:
                    less = _base(places, task_vectors, start, rows, size)
                    row = rows[_TERMS, :size]
                    dtypes.widen(places[term["place"]], start, less, row)
                    tiles.finite(row)
                    tiles.absolutes(row, line[:size])
                    tiles.drop_drawn(term, first + start, words, row, np.float32(1.0))
                    tiles.absolutes(row, line[TILE : TILE + size])
                depth = _carry(stack, depth, visit)
            _root(stack, 2, lines, sums[block, number])


@Kernel
def products(places: Records, numel: int, sums: Doubles) -> None:
    """Both squared norms of two models and their dot product per block: ``sums`` is ``[blocks, 3]``."""
    rows = _rows(1, numel)
    stack = np.empty((_LEVELS + 1, 3 * TILE), np.float64)
    for block in range(sums.shape[0]):
        begin = block * SURVEY_ELEMENTS
        end = min(begin + SURVEY_ELEMENTS, numel)
        lines = _lines(end - begin)
        depth = 0
        for visit in range(lines):
            start = begin + _line(visit, lines) * TILE
            size = max(0, min(TILE, end - start))
            line = stack[depth]
            depth += 1
            line[:] = 0.0
            if size > 0:
                one, two = rows[_TOTAL, :size], rows[_TERMS, :size]
                dtypes.widen(places[0], start, rows[_ZEROS, :size], one)
                dtypes.widen(places[1], start, rows[_ZEROS, :size], two)
                tiles.finite(one)
                tiles.finite(two)
                tiles.multiply(one, one, line[:size])
                tiles.multiply(two, two, line[TILE : TILE + size])
                tiles.multiply(one, two, line[2 * TILE : 2 * TILE + size])
            depth = _carry(stack, depth, visit)
        _root(stack, 3, lines, sums[block])
