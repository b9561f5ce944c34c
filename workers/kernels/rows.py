"""Whole tensors, row by row, in torch: what methods do that no formula of elements says.

Inputs are of float32, bfloat16 or float16 and of one shape, and are left alone; outputs are float32. Sums are float64
by a fixed tree, and angles are Python's, so the bits are the same on every machine; statistics read NaN and
infinities as zero. Rows run along a tensor's last dimension; a tensor of no or one dimension is one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch

from workers.kernels.reference import finite_or_zero, float32, to_float32
from workers.kernels.scalars import slerp_weights, stock_ratio

_ELEMENTS = 1 << 20
"""Of each matrix that are looked at together in float64, unless a single row has more."""

_NUMBERS = 1 << 16
"""Python numbers that are worked out together."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor as a matrix whose rows run along its last dimension."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row of a float64 matrix, by a fixed tree: its second half is added to its first until one
    column is left, filled up with zeros at the beginning. Of one column it is a view."""
    width = 1 << max(0, x.shape[1] - 1).bit_length()
    sums = x
    while width > 1:
        width //= 2
        if sums.shape[1] > width:
            low, high = sums[:, :width], sums[:, width:]
            sums = low.clone()
            sums[:, : high.shape[1]] += high
    return sums[:, 0]


def turn_rows(
    base: torch.Tensor | None, models: Sequence[torch.Tensor], t: float, dimension: int
) -> torch.Tensor:
    """Two models' vectors along a dimension (task vectors where there is a base), each pair interpolated on its
    great circle; see :func:`workers.methods.spans.turned`."""
    shape = models[0].shape
    at = dimension if models[0].dim() else 0
    one, two = (
        as_rows(vector.movedim(at, -1) if vector.dim() else vector) for vector in _vectors(base, models)
    )
    shares = torch.empty(one.shape[0], 2)
    for rows in _runs(one, 5):
        first, second, dot = (_dots(x[rows], y[rows]) for x, y in ((one, one), (two, two), (one, two)))
        cosines = map(_cosine, first, second, dot)
        shares[rows] = torch.tensor(
            [slerp_weights(t, math.acos(cosine)) for cosine in cosines], dtype=torch.float64
        )
    merged = one * shares[:, :1] + two * shares[:, 1:]
    if len(shape):
        moved = torch.empty(shape).movedim(at, -1).shape
        merged = merged.reshape(moved).movedim(-1, at)
    return _on(base, merged.reshape(shape))


def stock_rows(base: torch.Tensor | None, models: Sequence[torch.Tensor]) -> torch.Tensor:
    """Model Stock, each row with its own ratio; see :func:`workers.methods.spans.stock`."""
    matrices = [as_rows(vector) for vector in _vectors(base, models)]
    pairs = list(combinations(range(len(matrices)), 2))
    shares = torch.empty(matrices[0].shape[0], 1)
    for rows in _runs(matrices[0], len(matrices) + 2 * len(pairs)):
        parts = [matrix[rows] for matrix in matrices]
        squares = [_dots(part, part) for part in parts]
        cosines = [
            map(_cosine, squares[one], squares[two], _dots(parts[one], parts[two])) for one, two in pairs
        ]
        ratios = [stock_ratio(of_row, len(models)) / len(models) for of_row in zip(*cosines, strict=True)]
        shares[rows, 0] = torch.tensor(ratios, dtype=torch.float64)
    total = matrices[0]
    for matrix in matrices[1:]:
        total = total + matrix
    return _on(base, (total * shares).reshape(models[0].shape))


def _vectors(base: torch.Tensor | None, models: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The models in float32, less the base where there is one."""
    wide = [to_float32(model) for model in models]
    if base is None:
        return wide
    start = to_float32(base)
    return [vector - start for vector in wide]


def _on(base: torch.Tensor | None, merged: torch.Tensor) -> torch.Tensor:
    return merged if base is None else to_float32(base) + merged


def _runs(matrix: torch.Tensor, numbers: int) -> Iterator[slice]:
    """Runs of a matrix' rows that are looked at together, where so many Python numbers are worked out of each."""
    rows, columns = matrix.shape
    step = max(1, min(_ELEMENTS // columns, _NUMBERS // numbers))
    return (slice(first, first + step) for first in range(0, rows, step))


def _dots(one: torch.Tensor, two: torch.Tensor) -> list[float]:
    """The dot product of each pair of rows; NaN and infinities count as zero."""
    return _floats(
        row_sums(finite_or_zero(one.contiguous()).double() * finite_or_zero(two.contiguous()).double())
    )


def _cosine(one: float, two: float, dot: float) -> float:
    """The cosine between two vectors, given their squared norms and their dot product; 0 where one has no length."""
    lengths = math.sqrt(one) * math.sqrt(two)
    return max(-1.0, min(1.0, dot / lengths)) if lengths > 0 else 0.0


def _floats(x: torch.Tensor) -> list[float]:
    found: list[float] = x.tolist()
    return found


def fuse_rows(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Arcee Fusion: the model's elements where their change, times their row's divergence, is an upper outlier among
    all of the tensor's; the base's elsewhere, and NaN where either is."""
    start, end = to_float32(base), to_float32(model)
    tau = end - start
    healthy = torch.where(torch.isfinite(tau), end, start)  # what is not a number has not changed
    before, after = as_rows(start), as_rows(healthy)
    importance = torch.empty(before.shape)
    for rows in _runs(before, 4):
        to, of = (finite_or_zero(x[rows].contiguous()).double() for x in (before, after))
        divergences = torch.tensor(_divergences(of, to), dtype=torch.float64).unsqueeze(1)
        importance[rows] = of.sub_(to).abs_().mul_(divergences)
    del healthy, after
    importance = importance.flatten()
    first, middle, third = _quartiles(importance)
    least = float32(middle + 1.5 * (third - first))
    tau = tau.flatten()
    kept = torch.where(importance < least, tau - tau, tau)
    return start + kept.reshape(start.shape)


def _quartiles(x: torch.Tensor) -> tuple[float, float, float]:
    """The lower quartile, median and upper quartile of some elements; of two candidates the lower."""
    places = [int((x.numel() - 1) * share) for share in (0.25, 0.5, 0.75)]
    ordered = np.partition(x.numpy(), sorted(set(places)))
    first, middle, third = (float(ordered[place]) for place in places)
    return first, middle, third


def _divergences(of: torch.Tensor, to: torch.Tensor) -> list[float]:
    """Of each row the Kullback-Leibler divergence of the softmax of ``of`` from that of ``to``, both float64."""
    of, to = (x - x.max(dim=1, keepdim=True).values for x in (of, to))
    weights = exponential(of)
    totals = row_sums(weights)
    moved = row_sums(of.sub_(to).mul_(weights))
    del weights, of
    others = row_sums(exponential(to))
    return [
        move / total + math.log(other) - math.log(total)
        for move, total, other in zip(_floats(moved), _floats(totals), _floats(others), strict=True)
    ]


_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_TAYLOR = [1 / math.factorial(power) for power in range(14)]


def exponential(x: torch.Tensor) -> torch.Tensor:
    """``e**x`` of float64 values of at most 0, to a few units in the last place; below e**-700 it is e**-700.

    Made of operations that are rounded alike everywhere, which ``torch.exp`` is not.
    """
    x = x.clamp(min=-700.0)
    power = (x * _LOG2E).round_()
    rest = x.sub_(power * _LN2_HIGH).sub_(power * _LN2_LOW)
    series = torch.full_like(rest, _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        series = series.mul_(rest).add_(coefficient)
    scale = power.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64)
    return series.mul_(scale)
