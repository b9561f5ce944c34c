"""Linear layers merged by what they make of their inputs, in torch: RegMean's closed form (2212.09849).

Inputs are of float32, bfloat16 or float16, and are left alone; outputs are float32. Sums, products and LAPACK's
solutions are float64, with the same promise about their last bits as in :mod:`workers.kernels.spectra`. NaN in a
model stays where it is, and counts as zero, as infinities and whatever is not finite in a Gram matrix do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from workers.kernels.reference import finite_or_zero, to_float32
from workers.kernels.scalars import weight_sum

MOST_NOISE = 1e-2
"""Of inputs in units of their size, a direction that has more of them than this is never taken for rounding error."""


def regression_mean(
    models: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    weights: Sequence[float],
    alpha: float,
    transposed: bool,
) -> torch.Tensor:
    """The matrix W for which Σ wᵢ·‖(W − Wᵢ)·Xᵢᵀ‖² is least, given the Gram matrices XᵢᵀXᵢ.

    What they leave open, directions that no model's inputs have, is the models' mean there: the limit of ever
    smaller multiples of the summed Grams' diagonal added to each.

    :param models: matrices of shape ``[out, in]``, or ``[in, out]`` when ``transposed``.
    :param grams: each model's, ``in * in`` elements; none at all leaves everything open, whatever the shape.
    :param weights: of the models, at least 0.
    :param alpha: what a Gram matrix's elements off the diagonal are multiplied by.
    """
    matrices = [model.T if transposed and grams else model for model in models]
    mean = _finite(matrices[0]) * weights[0]
    for matrix, weight in zip(matrices[1:], weights[1:], strict=True):
        mean += _finite(matrix) * weight
    mean /= weight_sum(weights)
    if grams:
        width = mean.shape[1]
        moved, total = torch.zeros_like(mean), torch.zeros(width, width, dtype=torch.float64)
        for matrix, gram, weight in zip(matrices, grams, weights, strict=True):
            scaled = _scaled(gram.reshape(width, width), alpha, weight)
            total += scaled
            moved += _finite(matrix).sub_(mean) @ scaled
            del scaled
        mean += _solved(moved, total, _noise(grams, width))
    merged = mean.to(torch.float32)
    for matrix in matrices:
        wide = to_float32(matrix)
        merged = merged + (wide - wide)  # zero, and NaN where it is none
    return merged.T.contiguous() if transposed and grams else merged


def _finite(x: torch.Tensor) -> torch.Tensor:
    return finite_or_zero(to_float32(x).contiguous()).double()


def _scaled(gram: torch.Tensor, alpha: float, weight: float) -> torch.Tensor:
    """A Gram matrix, symmetric whatever was stored, less its correlations, times the model's weight."""
    wide = _finite(gram)
    diagonal = wide.diagonal().clone()
    wide = wide.add_(wide.T.clone()).mul_(alpha / 2)
    wide.diagonal().copy_(diagonal)
    return wide.mul_(weight)


def _noise(grams: Sequence[torch.Tensor], width: int) -> float:
    """About how large eigenvalues are, beside a diagonal of ones, that stem from the rounding of what was stored."""
    coarsest = max(torch.finfo(gram.dtype).eps for gram in grams)
    return min(MOST_NOISE, coarsest * math.sqrt(width))


def _solved(right: torch.Tensor, total: torch.Tensor, noise: float) -> torch.Tensor:
    """X with ``X @ total == right`` as nearly as can be; zero where ``total`` says nothing. Both are overwritten.

    The matrix is brought to a diagonal of ones first, so that the inputs' units do not matter.
    """
    sizes = total.diagonal().clamp(min=0.0).sqrt()
    known = sizes > 0
    units = torch.where(known, 1.0 / torch.where(known, sizes, 1.0), 0.0)
    total.mul_(units).mul_(units.unsqueeze(1))
    total.diagonal().copy_(torch.ones_like(units))
    right.mul_(units)
    factor, failed = torch.linalg.cholesky_ex(total)
    if not int(failed) and bool((factor.diagonal().square() > noise).all()):
        del total
        solved: torch.Tensor = torch.cholesky_solve(right.T, factor).T
        return solved * units
    del factor
    values, vectors = torch.linalg.eigh(total)
    told = values > noise
    vectors = vectors[:, told]
    found: torch.Tensor = ((right @ vectors) / values[told]) @ vectors.T
    return found * units
