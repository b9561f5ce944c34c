"""Adapters, compiled: the same bits as :func:`workers.kernels.low_rank.add_products`, which says what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from workers.kernels import cpu_dtypes as dtypes
from workers.kernels.cpu_compile import Floats, Integers, Kernel, Records, inlined
from workers.kernels.cpu_passes import PLACE
from workers.kernels.low_rank import Product, rows_of
from workers.kernels.reference import float32

FACTOR = np.dtype(
    [("address", "i8"), ("dtype", "i8"), ("width", "i8"), ("row", "i8"), ("column", "i8")], align=True
)
"""A matrix: as :data:`PLACE`, and how many elements lie between one and the next of a column, and of a row."""

_HELD = 1 << 16
"""Elements of the right matrices that are widened at a time: they stay in the core's own caches."""

_NARROWEST, _WIDEST = 64, 1 << 11
"""Columns of them: enough that rows are worth a loop, and few enough that sums stay in the first-level cache."""

_MINUS_ZERO = np.float32(-0.0)


def add_products(
    run: torch.Tensor, products: Sequence[Product], offset: int, columns: int, out: torch.Tensor
) -> None:
    """Write ``run`` plus ``products`` to ``out``, of a length of at least one; up to 1 MiB of workspace per 4096 ranks.

    :raises ValueError: a product has other rows or columns, or what is no matrix in main memory was given.
    """
    if out.numel() != run.numel() or not run.is_contiguous() or not out.is_contiguous():
        raise ValueError("compiled kernels take contiguous runs of one length")
    for product in products:
        product.check(rows_of(run.numel(), offset, columns), columns)
    places = [(tensor.data_ptr(), dtypes.CODES[tensor.dtype], tensor.element_size()) for tensor in (run, out)]
    _low_rank(
        np.array(places, dtype=PLACE),
        _factors([product.left for product in products]),
        _factors([product.right for product in products]),
        np.array([product.left.shape[1] for product in products], dtype=np.int64),
        np.array([float32(product.scale) for product in products], dtype=np.float32),
        offset,
        columns,
        run.numel(),
    )


def _factors(matrices: Sequence[torch.Tensor]) -> Records:
    found = [
        (matrix.data_ptr(), dtypes.CODES[matrix.dtype], matrix.element_size(), *matrix.stride())
        for matrix in matrices
    ]
    return np.array(found, dtype=FACTOR)


@inlined
def _add_one(a: Floats, p: np.float32, total: Floats) -> None:
    for i in range(total.size):
        total[i] += p * a[i]


@inlined
def _add_four(
    a: Floats, b: Floats, c: Floats, d: Floats, p: np.float32, q: np.float32, r: np.float32, s: np.float32,
    total: Floats,
) -> None:  # fmt: skip
    """Add four rows, each times its factor, to ``total``, one after the other."""
    for i in range(total.size):
        total[i] = (((total[i] + p * a[i]) + q * b[i]) + r * c[i]) + s * d[i]


@inlined
def _add_scaled(total: Floats, scale: np.float32, row: Floats) -> None:
    for i in range(row.size):
        row[i] += total[i] * scale


@inlined
def _fill(rights: Records, ranks: Integers, begin: int, size: int, wide: Floats) -> None:
    """Widen the columns from ``begin`` on of all right matrices, one below the other."""
    at = 0
    for number in range(ranks.size):
        factor = rights[number]
        for rank in range(ranks[number]):
            for column in range(size):
                where = rank * factor["row"] + (begin + column) * factor["column"]
                wide[at, column] = dtypes.element(factor, where)
            at += 1


@Kernel
def _low_rank(
    places: Records,
    lefts: Records,
    rights: Records,
    ranks: Integers,
    scales: Floats,
    offset: int,
    columns: int,
    numel: int,
) -> None:
    """Write ``places[0]`` plus each product to ``places[1]``, some columns of all rows at a time."""
    held = max(1, ranks.sum())
    step = min(max(_NARROWEST, min(_WIDEST, _HELD // held // 16 * 16)), columns)
    wide = np.empty((held, step), np.float32)
    rows = np.empty((2, step), np.float32)
    zeros, minus_zeros = np.zeros(step, np.float32), np.full(step, _MINUS_ZERO, np.float32)
    for begin in range(0, columns, step):
        _fill(rights, ranks, begin, min(step, columns - begin), wide)
        for row in range((offset + numel + columns - 1) // columns):
            origin = row * columns - offset  # of the row, within the run
            first = max(begin, -origin)
            last = min(begin + step, columns, numel - origin)
            if first >= last:
                continue
            near, far, size = first - begin, last - begin, last - first
            made, total = rows[0, :size], rows[1, :size]
            dtypes.widen(places[0], origin + first, zeros[:size], made)
            at = 0
            for number in range(ranks.size):
                left, count = lefts[number], ranks[number]
                where = row * left["row"]
                total[:] = dtypes.ZERO
                fours = count // 4 * 4
                for rank in range(0, fours, 4):
                    _add_four(
                        wide[at + rank, near:far],
                        wide[at + rank + 1, near:far],
                        wide[at + rank + 2, near:far],
                        wide[at + rank + 3, near:far],
                        dtypes.element(left, where + rank * left["column"]),
                        dtypes.element(left, where + (rank + 1) * left["column"]),
                        dtypes.element(left, where + (rank + 2) * left["column"]),
                        dtypes.element(left, where + (rank + 3) * left["column"]),
                        total,
                    )
                for rank in range(fours, count):
                    _add_one(
                        wide[at + rank, near:far],
                        dtypes.element(left, where + rank * left["column"]),
                        total,
                    )
                _add_scaled(total, scales[number], made)
                at += count
            dtypes.store(places[1], origin + first, made, dtypes.ONE, minus_zeros[:size])
