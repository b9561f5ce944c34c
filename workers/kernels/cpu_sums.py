"""The compiled kernels that add elements up in float64: norms and dot products, by one fixed tree."""

from __future__ import annotations

import numpy as np

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import cpu_dtypes as dtypes
from workers.kernels import cpu_tiles as tiles
from workers.kernels.cpu_compile import Doubles, Kernel, Records, inlined
from workers.kernels.cpu_passes import TERMS, TILE, TOTAL, ZEROS, base_tile, rows_for

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
def products(places: Records, numel: int, sums: Doubles) -> None:
    """Both squared norms of two models and their dot product per block: ``sums`` is ``[blocks, 3]``."""
    rows = rows_for(1, numel)
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
                one, two = rows[TOTAL, :size], rows[TERMS, :size]
                dtypes.widen(places[0], start, rows[ZEROS, :size], one)
                dtypes.widen(places[1], start, rows[ZEROS, :size], two)
                tiles.finite(one)
                tiles.finite(two)
                tiles.multiply(one, one, line[:size])
                tiles.multiply(two, two, line[TILE : TILE + size])
                tiles.multiply(one, two, line[2 * TILE : 2 * TILE + size])
            depth = _carry(stack, depth, visit)
        _root(stack, 3, lines, sums[block])
