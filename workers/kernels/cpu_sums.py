"""The compiled kernels that add elements up in float64: norms and dot products, by one fixed tree."""

from __future__ import annotations

import numpy as np

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import cpu_dtypes as dtypes
from workers.kernels import cpu_tiles as tiles
from workers.kernels.cpu_compile import Doubles, Floats, Integers, Kernel, Records, inlined
from workers.kernels.cpu_passes import TERMS, TILE, base_tile, rows_for
from workers.kernels.cpu_programs import finite_terms, run

PAIRS = 12
"""Most dot products that are added up at once: what they need of memory stays small."""

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
    rows = rows_for(1, numel)
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
                    less = base_tile(places, task_vectors, start, rows, size)
                    row = rows[TERMS, :size]
                    dtypes.widen(places[term["place"]], start, less, row)
                    tiles.finite(row)
                    tiles.absolutes(row, line[:size])
                    tiles.drop_drawn(term, first + start, words, row, np.float32(1.0))
                    tiles.absolutes(row, line[TILE : TILE + size])
                depth = _carry(stack, depth, visit)
            _root(stack, 2, lines, sums[block, number])


@Kernel
def products(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    code: Integers,
    values: Floats,
    slots: int,
    pairs: Integers,
    sums: Doubles,
) -> None:
    """The dot products of pairs of rows of a program, per block: ``sums`` is ``[blocks, pairs]``.

    ``pairs`` are at most ``PAIRS``, each of two slots.
    """
    rows = rows_for(slots, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    count = pairs.shape[0]
    stack = np.empty((_LEVELS + 1, count * TILE), np.float64)
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
                finite_terms(places, terms, first, start, task_vectors, words, left, rows, size)
                run(code, values, rows, size)
                for pair in range(count):
                    one, two = rows[TERMS + pairs[pair, 0], :size], rows[TERMS + pairs[pair, 1], :size]
                    tiles.multiply(one, two, line[pair * TILE : pair * TILE + size])
            depth = _carry(stack, depth, visit)
        _root(stack, count, lines, sums[block])
