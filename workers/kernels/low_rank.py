"""Adapters: matrices of a low rank that are added to a matrix. What it means, in torch; ``cpu_low_rank`` does it.

A run of a matrix may begin and end within a row. No element depends on where the run that it is in begins or ends:
an element is one sum over the ranks, in order, one float32 operation at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.kernels import reference


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``scale * (left @ right)``, of float32, bfloat16 or float16 matrices in main memory, of any strides."""

    left: torch.Tensor
    """The rows that the run has elements of: shape ``[rows, rank]``."""
    right: torch.Tensor
    """All columns: shape ``[rank, columns]``."""
    scale: float
    """What the product is multiplied by, once rounded to float32."""

    def check(self, rows: int, columns: int) -> None:
        """:raises ValueError: it is no product of that many rows and columns."""
        rank = self.left.shape[1]
        if self.left.shape != (rows, rank) or self.right.shape != (rank, columns):
            shapes = f"{list(self.left.shape)} and {list(self.right.shape)}"
            raise ValueError(f"matrices of shape {shapes} make no [{rows}, {columns}]")


def rows_of(numel: int, offset: int, columns: int) -> int:
    """How many rows a run of ``numel`` elements that begins ``offset`` elements into a row has elements of."""
    return -(-(offset + numel) // columns)


def add_products(
    run: torch.Tensor, products: Sequence[Product], offset: int, columns: int, out: torch.Tensor
) -> None:
    """Write ``run`` plus ``products``, one after the other, to ``out``; rounded once.

    :param run: elements of a matrix, shape ``[n]``, in order of its rows; float32, bfloat16 or float16.
    :param offset: how far within its row the first element is.
    :param columns: of the matrix.
    :param out: shape ``[n]``; may be ``run`` itself.
    :raises ValueError: a product has other rows or columns.
    """
    rows = rows_of(run.numel(), offset, columns)
    within = slice(offset, offset + run.numel())
    total = torch.zeros(rows * columns)
    total[within] = reference.to_float32(run)
    total = total.view(rows, columns)
    for product in products:
        product.check(rows, columns)
        left, right = reference.to_float32(product.left), reference.to_float32(product.right)
        added = torch.zeros(rows, columns)
        for rank in range(left.shape[1]):
            added = added + left[:, rank : rank + 1] * right[rank]
        total = total + reference.scale(added, product.scale)
    out.copy_(reference.round_to(total.view(-1)[within], out.dtype))
