"""Whole tensors, row by row, in torch: what methods do that no formula of elements says.

Inputs are of float32, bfloat16 or float16 and of one shape, and are left alone; outputs are float32. Sums are float64
by a fixed tree, and angles are Python's, so the bits are the same on every machine; statistics read NaN and
infinities as zero. Rows run along a tensor's last dimension; a tensor of no or one dimension is one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from workers.kernels.reference import finite_or_zero, float32, to_float32
from workers.kernels.scalars import slerp_weights, stock_ratio


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor as a matrix whose rows run along its last dimension."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row of a float64 matrix, by a fixed tree: its second half is added to its first until one
    column is left, filled up with zeros at the beginning."""
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
    matrices = [
        as_rows(vector.movedim(at, -1) if vector.dim() else vector) for vector in _vectors(base, models)
    ]
    one, two = (finite_or_zero(matrix.contiguous()).double() for matrix in matrices)
    firsts, seconds, dots = (row_sums(x * y).tolist() for x, y in ((one, one), (two, two), (one, two)))
    del one, two
    weights = []
    for first, second, dot in zip(firsts, seconds, dots, strict=True):
        lengths = math.sqrt(first) * math.sqrt(second)
        cosine = max(-1.0, min(1.0, dot / lengths)) if lengths > 0 else 0.0
        weights.append(slerp_weights(t, math.acos(cosine)))
    shares = torch.tensor(weights, dtype=torch.float64).to(torch.float32)
    merged = matrices[0] * shares[:, :1] + matrices[1] * shares[:, 1:]
    if len(shape):
        moved = torch.empty(shape).movedim(at, -1).shape
        merged = merged.reshape(moved).movedim(-1, at)
    return _on(base, merged.reshape(shape))


def stock_rows(base: torch.Tensor | None, models: Sequence[torch.Tensor]) -> torch.Tensor:
    """Model Stock, each row with its own ratio; see :func:`workers.methods.spans.stock`."""
    matrices = [as_rows(vector) for vector in _vectors(base, models)]
    squares = [row_sums(_square(matrix, matrix)).tolist() for matrix in matrices]
    cosines: list[list[float]] = [[] for _ in squares[0]]
    for number, matrix in enumerate(matrices):
        for other in range(number):
            dots = row_sums(_square(matrix, matrices[other])).tolist()
            for row, (one, two, dot) in enumerate(zip(squares[number], squares[other], dots, strict=True)):
                lengths = math.sqrt(one) * math.sqrt(two)
                cosines[row].append(max(-1.0, min(1.0, dot / lengths)) if lengths > 0 else 0.0)
    ratios = [stock_ratio(of_row, len(models)) / len(models) for of_row in cosines]
    shares = torch.tensor(ratios, dtype=torch.float64).to(torch.float32).unsqueeze(1)
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


def _square(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Products in float64, exact, with NaN and infinities as zero."""
    return finite_or_zero(one.contiguous()).double() * finite_or_zero(two.contiguous()).double()


def fuse_rows(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Arcee Fusion: the model's elements where their change, times their row's divergence, is an upper outlier among
    all of the tensor's; the base's elsewhere, and NaN where either is."""
    start, end = to_float32(base), to_float32(model)
    tau = end - start
    healthy = torch.where(torch.isfinite(tau), end, start)  # what is not a number has not changed
    rows, others = (finite_or_zero(as_rows(x).contiguous()).double() for x in (start, healthy))
    del healthy
    divergences = torch.tensor(_divergences(others, rows), dtype=torch.float64).unsqueeze(1)
    importance = ((others - rows).abs() * divergences).to(torch.float32).flatten()
    del rows, others
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
    shifted = of - of.max(dim=1, keepdim=True).values
    weights = exponential(shifted)
    totals = row_sums(weights)
    moved = row_sums(weights * (shifted - (to - to.max(dim=1, keepdim=True).values)))
    others = row_sums(exponential(to - to.max(dim=1, keepdim=True).values))
    return [
        move / total + math.log(other) - math.log(total)
        for move, total, other in zip(moved.tolist(), totals.tolist(), others.tolist(), strict=True)
    ]


_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_TAYLOR = [1 / math.factorial(power) for power in range(14)]


def exponential(x: torch.Tensor) -> torch.Tensor:
    """``e**x`` of float64 values of at most 0, to a few units in the last place; below e**-700 it is e**-700.

    Made of operations that are rounded alike everywhere, which ``torch.exp`` is not.
    """
    x = x.clamp(min=-700.0)
    power = torch.round(x * _LOG2E)
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    series = torch.full_like(rest, _TAYLOR[-1])
    for coefficient in reversed(_TAYLOR[:-1]):
        series = series.mul_(rest).add_(coefficient)
    scale = (power.to(torch.int64) + 1023).bitwise_left_shift_(52).view(torch.float64)
    return series.mul_(scale)
