"""Programs (:mod:`workers.kernels.program`) on the processor: one compiled loop of tiles for all of them.

A tile's rows lie in a few slots: a step's row takes the room of one that no later step reads, so they stay in the
core's own caches. Each operation is a loop so simple that LLVM makes vectors of it; going from one to the next costs
nothing beside a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.kernels import cpu_dtypes as dtypes
from workers.kernels import cpu_tiles as tiles
from workers.kernels.cpu_compile import Floats, Integers, Kernel, Records, Words, bits_of, float_of, inlined
from workers.kernels.cpu_dtypes import MAGNITUDE, ONE, ZERO
from workers.kernels.cpu_passes import (
    BASE,
    BINS,
    COLUMNS,
    MERGED,
    MINUS_ZEROS,
    TERMS,
    TILE,
    ZEROS,
    base_tile,
    overflowed,
    rows_for,
    term_tile,
)
from workers.kernels.program import OPERATIONS, Program

_CONSTANT, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _ABSOLUTE, _LESS, _GREATER, _CHOOSE = range(9)


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """A program with a slot for each row."""

    code: Integers
    """``[steps, 5]``: the operation, the slot that it writes, and those that it reads."""
    values: Floats
    """``[steps]``: what constants are."""
    slots: int
    """How many slots there are."""
    outputs: Integers
    """The slots of the outputs."""


def assemble(program: Program) -> Assembled:
    """Give each row of a program a slot. No step writes where it reads, which keeps its loop one of vectors."""
    uses = program.last_uses
    slot_of = list(range(program.terms))
    slots = program.terms
    free = [row for row in range(program.terms) if uses[row] < 0]
    code = np.zeros((len(program.steps), 5), dtype=np.int64)
    for number, step in enumerate(program.steps):
        row = program.terms + number
        if free:
            slot_of.append(free.pop())
        else:
            slot_of.append(slots)
            slots += 1
        code[number, :2] = OPERATIONS.index(step.operation), slot_of[row]
        for place, operand in enumerate(step.rows):
            code[number, 2 + place] = slot_of[operand]
        done = {operand for operand in (*step.rows, row) if uses[operand] <= number}
        free.extend(slot_of[operand] for operand in sorted(done))
    with np.errstate(over="ignore"):
        values = np.array([step.value for step in program.steps], dtype=np.float32)
    outputs = np.array([slot_of[row] for row in program.outputs], dtype=np.int64)
    return Assembled(code, values, slots, outputs)


@inlined
def run(code: Integers, values: Floats, rows: Floats, size: int) -> None:  # noqa: PLR0912 - one for each operation
    """Take all steps of a program on a tile, whose terms lie in the first slots."""
    for step in range(code.shape[0]):
        operation = code[step, 0]
        into, a = rows[TERMS + code[step, 1], :size], rows[TERMS + code[step, 2], :size]
        b, c = rows[TERMS + code[step, 3], :size], rows[TERMS + code[step, 4], :size]
        if operation == _CONSTANT:
            into[:] = values[step]
        elif operation == _ADD:
            for i in range(size):
                into[i] = a[i] + b[i]
        elif operation == _SUBTRACT:
            for i in range(size):
                into[i] = a[i] - b[i]
        elif operation == _MULTIPLY:
            for i in range(size):
                into[i] = a[i] * b[i]
        elif operation == _DIVIDE:
            for i in range(size):
                into[i] = a[i] / b[i]
        elif operation == _ABSOLUTE:
            for i in range(size):
                into[i] = float_of(np.uint32(bits_of(a[i]) & MAGNITUDE))
        elif operation == _LESS:
            for i in range(size):
                into[i] = ONE if a[i] < b[i] else ZERO
        elif operation == _GREATER:
            for i in range(size):
                into[i] = ONE if a[i] > b[i] else ZERO
        elif operation == _CHOOSE:
            for i in range(size):
                into[i] = c[i] if a[i] == ZERO else b[i]


@inlined
def finite_terms(
    places: Records,
    terms: Records,
    first: int,
    start: int,
    task_vectors: bool,
    words: Words,
    left: Integers,
    rows: Floats,
    size: int,
) -> None:
    """The terms' tiles at ``start``, in the first slots, with NaN and infinities as zero: for a statistic."""
    less = base_tile(places, task_vectors, start, rows, size)
    for number in range(terms.size):
        row = rows[TERMS + number, :size]
        minus = rows[ZEROS, :size] if terms[number]["statistic"] != 0 else less
        term_tile(places, terms[number], first, start, minus, words, left, number, row)
        tiles.finite(row)


@Kernel
def program_merge(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    code: Integers,
    values: Floats,
    slots: int,
    output: int,
    divided: bool,
    divisor: np.float32,
    factor: np.float32,
    found: Integers,
) -> None:
    """Write what a program makes to the last of ``places``.

    ``found`` gets the non-finite elements of each input, then the overflowed.
    """
    inputs = places.size - 1
    rows = rows_for(slots, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    bad = np.empty(inputs, np.int64)
    for start in range(0, numel, TILE):
        size = min(TILE, numel - start)
        bad[:] = -1
        less = rows[ZEROS, :size]
        if task_vectors:
            less = rows[BASE, :size]
            bad[0] = dtypes.widen(places[0], start, rows[ZEROS, :size], less)
        for number in range(terms.size):
            row = rows[TERMS + number, :size]
            minus = rows[ZEROS, :size] if terms[number]["statistic"] != 0 else less
            bad[terms[number]["place"]] = term_tile(
                places, terms[number], first, start, minus, words, left, number, row
            )
        run(code, values, rows, size)
        merged = rows[TERMS + output, :size]
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


@Kernel
def program_histogram(
    places: Records,
    terms: Records,
    first: int,
    numel: int,
    task_vectors: bool,
    code: Integers,
    values: Floats,
    slots: int,
    outputs: Integers,
    high: Integers,
    counts: Integers,
) -> None:
    """Count the high 16 bits of each output, or where ``high`` is not negative, the low ones within that bin."""
    rows = rows_for(slots, numel)
    words = np.zeros(TILE, np.uint32)
    left = np.zeros(terms.size, np.int64)
    table = np.zeros((BINS + 1) * COLUMNS, np.uint32)
    for number in range(outputs.size):
        for start in range(0, numel, TILE):
            size = min(TILE, numel - start)
            finite_terms(places, terms, first, start, task_vectors, words, left, rows, size)
            run(code, values, rows, size)
            row = rows[TERMS + outputs[number], :size]
            if high[number] < 0:
                tiles.high_bits(row, words[:size])
            else:
                tiles.low_bits(row, np.uint32(high[number]), words[:size])
            tiles.count(words[:size], table)
        tiles.move(table, counts[number])
