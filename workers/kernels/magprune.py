"""DELLA's step (2406.11617) in torch, a whole tensor at a time: drop elements at random, small ones rather than large.

An element's chance to stay depends on the rank of its magnitude within its row, so no element can do without its row.
Which are drawn is decided as DARE does, by Philox words of the elements' flat indexes.
"""

from __future__ import annotations

import torch

from workers.kernels.reference import drop, finite_or_zero, float32, to_float32
from workers.kernels.rows import as_rows, row_sums
from workers.random import words

SMALL_NORM = 1e-7
"""Below this L1 norm after the drop, matching norms leaves the vector as it is."""


def pruned(
    base: torch.Tensor, model: torch.Tensor, chances: torch.Tensor, key: int, rescale: str
) -> torch.Tensor:
    """A task vector, pruned and rescaled: float32, flat.

    :param chances: to stay, in float64, by rank of the magnitude in its row, the smallest first; equal magnitudes rank
        as they lie.
    :param rescale: ``inverse`` divides each element by its chance, ``l1`` restores the tensor's L1 norm, ``none`` does
        nothing.
    """
    tau = to_float32(model) - to_float32(base)
    rows = as_rows(tau)
    magnitudes = finite_or_zero(rows.contiguous()).abs()
    order = torch.argsort(magnitudes, dim=1, stable=True)
    bounds = (chances * 2.0**32).to(torch.int64)
    of_element = torch.empty_like(order).scatter_(1, order, bounds.expand_as(order)).flatten()
    flat = rows.reshape(-1)
    mask = words(key, flat.numel()) < of_element
    if rescale == "inverse":
        factors = chances.reciprocal().to(torch.float32)
        by_element = torch.empty_like(magnitudes).scatter_(1, order, factors.expand_as(magnitudes))
        flat = flat * by_element.flatten()
    factor = 1.0
    if rescale == "l1":
        sums = magnitudes.reshape(1, -1).double()
        before = float(row_sums(sums))
        after = float(row_sums(sums.masked_fill_(~mask.reshape(1, -1), 0.0)))
        factor = before / after if after >= SMALL_NORM else 1.0
    return drop(flat, mask, float32(factor))
