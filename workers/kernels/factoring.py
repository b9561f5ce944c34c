"""Factors of a sum of low-rank changes and of dense ones, in torch, in float64.

What is put together from factors alone is never multiplied out: its singular vectors come from the QR decompositions
of both sides (Golub and Van Loan, Matrix Computations, 5.4.3 for the idea). Decompositions are LAPACK's: what they
round otherwise on another processor may be seen in the last bits of the result. Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.kernels.reference import finite_or_zero


@dataclass(frozen=True, slots=True)
class Factored:
    """Two factors, and what their product leaves out."""

    a: torch.Tensor
    """``[rank, in]``, float64."""
    b: torch.Tensor
    """``[out, rank]``, float64."""
    lost: float
    """Squared Frobenius norm of what is left out."""
    total: float
    """Squared Frobenius norm of the whole."""


def stacked(pairs: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` and ``B`` in float64 with ``B @ A`` the sum of ``scale * (b @ a)`` over the triples ``(a, b, scale)``."""
    a = torch.cat([_wide(each) for each, _, _ in pairs])
    b = torch.cat([_wide(each) * scale for _, each, scale in pairs], dim=1)
    return a, b


def kept(a: torch.Tensor, b: torch.Tensor) -> Factored:
    """The factors as they are."""
    return Factored(a, b, 0.0, float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0)))


def truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> Factored:
    """The nearest product of a lower rank (Eckart, Young, Mirsky) to ``b @ a``."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    found = decomposed(upper @ lower.T, rank)
    return _signed(Factored(found.a @ right.T, left @ found.b, found.lost, found.total))


def decomposed(x: torch.Tensor, rank: int) -> Factored:
    """The nearest product of factors of this rank to a matrix; each has the square roots of the singular values."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    roots = values.sqrt()
    a, b = x.new_zeros(rank, x.shape[1]), x.new_zeros(x.shape[0], rank)
    most = min(rank, len(values))
    a[:most] = roots[:most, None] * right[:most]
    b[:, :most] = left[:, :most] * roots[:most]
    squares = values.square()
    return _signed(Factored(a, b, float(squares[rank:].sum()), float(squares.sum())))


def dense(
    base: torch.Tensor,
    models: Sequence[tuple[torch.Tensor, float]],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
) -> torch.Tensor:
    """The sum of ``coefficient * (model - base)`` and of the triples' products, ``[out, in]``, in float64."""
    start = _wide(base)
    total = torch.zeros_like(start)
    for model, coefficient in models:
        total += coefficient * (_wide(model) - start)
    for a, b, scale in pairs:
        total += scale * (_wide(b) @ _wide(a))
    return total


def _signed(found: Factored) -> Factored:
    """The same product, with the sign of each pair of vectors chosen: the largest element of A's row is positive."""
    if not found.a.numel():
        return found
    rows = found.a.gather(1, found.a.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(rows < 0, -1.0, 1.0).to(found.a.dtype)
    return Factored(found.a * signs, found.b * signs.T, found.lost, found.total)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return finite_or_zero(x.to(torch.float32).contiguous()).double()
