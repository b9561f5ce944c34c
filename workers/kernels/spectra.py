"""Whole matrices by their singular vectors, in torch.

Inputs are of float32, bfloat16 or float16 and of one shape, and are left alone; outputs are float32. Decompositions are
LAPACK's in float64, so the bits are those of one build of it on one kind of processor: what it rounds otherwise
elsewhere is mostly gone when the result is rounded to float32, but that is not promised. A tensor of three or more
dimensions is a matrix of its first one by all others; one of none or one has no singular vectors, and is averaged.
NaN stays where it is, and counts as zero, as infinities do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.kernels.reference import finite_or_zero, scale, to_float32

NEGLIGIBLE = 1e-12
"""A singular value so small beside the largest is zero."""


def singular_merge(
    base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float], lambda_: float
) -> torch.Tensor:
    """Task singular vectors (TSV-M, 2412.00081): each task vector's share of its largest singular vectors, made
    orthogonal to those of the others, put together."""
    taus = _task_vectors(base, models)
    if base.dim() < 2:
        return _on(base, taus, _mean(taus, weights), lambda_)
    rank = max(1, min(_matrix(taus[0]).shape) // len(taus))
    lefts, values, rights = [], [], []
    for tau, weight in zip(taus, weights, strict=True):
        left, value, right = torch.linalg.svd(_matrix(tau), full_matrices=False)
        real = int(torch.count_nonzero(value[:rank] > NEGLIGIBLE * value[0]))
        lefts.append(left[:, :real])
        values.append(value[:real] * weight)
        rights.append(right[:real])
    merged = nearest_orthogonal(torch.cat(lefts, dim=1)) * torch.cat(values)
    return _on(base, taus, merged @ nearest_orthogonal(torch.cat(rights)), lambda_)


def aligned_merge(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    lambda_: float,
) -> torch.Tensor:
    """KnOTS with TIES (2410.19735): the task vectors side by side are decomposed together, and what each has in the
    common directions is trimmed and merged by elected signs."""
    taus = _task_vectors(base, models)
    if base.dim() < 2:
        return _on(base, taus, _mean(taus, weights), lambda_)
    matrices = [_matrix(tau) for tau in taus]
    width = matrices[0].shape[1]
    left, values, right = torch.linalg.svd(torch.cat(matrices, dim=1), full_matrices=False)
    real = int(torch.count_nonzero(values > NEGLIGIBLE * values[0]))
    parts = [
        _trimmed(part, density) for part, density in zip(right[:real].split(width, 1), densities, strict=True)
    ]
    weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
    total = weighted[0]
    for part in weighted[1:]:
        total = total + part
    signs = torch.where(total >= 0, 1.0, -1.0).to(torch.float64)
    merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight in zip(weighted, weights, strict=True):
        agrees = part * signs > 0
        merged += torch.where(agrees, part, 0.0)
        divisor += torch.where(agrees, abs(weight), 0.0)
    merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return _on(base, taus, (left[:, :real] * values[:real]) @ merged, lambda_)


def nearest_orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The matrix nearest to ``x`` whose singular values are 1, or 0 where those of ``x`` are: Procrustes' problem."""
    if not x.numel():
        return x
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    real = int(torch.count_nonzero(values > NEGLIGIBLE * values[0]))
    nearest: torch.Tensor = left[:, :real] @ right[:real]
    return nearest


def _task_vectors(base: torch.Tensor, models: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    start = to_float32(base)
    return [to_float32(model) - start for model in models]


def _matrix(tau: torch.Tensor) -> torch.Tensor:
    return finite_or_zero(tau.contiguous()).double().reshape(tau.shape[0], -1)


def _mean(taus: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = finite_or_zero(taus[0].contiguous()).double() * weights[0]
    for tau, weight in zip(taus[1:], weights[1:], strict=True):
        total = total + finite_or_zero(tau.contiguous()).double() * weight
    return total / len(taus)


def _trimmed(part: torch.Tensor, density: float) -> torch.Tensor:
    """The largest magnitudes of a matrix, as many as the density says; equal ones stay together."""
    kept = int(density * part.numel())
    if not kept:
        return torch.zeros_like(part)
    size = part.abs()
    least = torch.kthvalue(size.flatten(), part.numel() - kept + 1).values
    return torch.where(size >= least, part, 0.0)


def _on(
    base: torch.Tensor, taus: Sequence[torch.Tensor], merged: torch.Tensor, lambda_: float
) -> torch.Tensor:
    change = scale(merged.to(torch.float32).reshape(base.shape), lambda_)
    for tau in taus:
        change = change + (tau - tau)  # zero, and NaN where it is none
    return to_float32(base) + change
