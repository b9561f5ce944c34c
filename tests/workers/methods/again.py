"""The newer methods once more, in float64 numpy and from their definitions: what the tests compare with.

Nothing here imports a kernel, and nothing is done the way the kernels do it: vectors are turned and summed as vectors,
not by their dot products.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def turned(a: Vector, b: Vector, t: float) -> Vector:
    """Spherical interpolation of two vectors (Shoemake 1985)."""
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    found: Vector = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return found


def spherical_mean(vectors: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """The weighted mean of the directions, as long as the weighted mean of the lengths."""
    mean = sum(w * v / np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
    length = sum(w * np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
    found: Vector = length * mean / np.linalg.norm(mean)
    return found


def tangent(at: Vector, to: Vector) -> Vector:
    """From a unit vector, the way along the sphere to another one: its direction, as long as the angle."""
    across = to - (to @ at) * at
    length = np.linalg.norm(across)
    found: Vector = across / length * np.arctan2(length, to @ at) if length > 0 else across * 0
    return found


def stock(base: Vector, models: Sequence[Vector]) -> Vector:
    """Model Stock (2403.19522)."""
    taus = [model - base for model in models]
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(taus) for b in taus[i + 1 :]
    ]
    mean, n = float(np.mean(cosines)), len(taus)
    t = n * mean / (1 + (n - 1) * mean)
    found: Vector = (1 - t) * base + t * np.mean(models, axis=0)
    return found


def middle(tau: Vector, density: float, gamma: float) -> Vector:
    """Model Breadcrumbs' mask (2312.06795), of different magnitudes."""
    n = tau.size
    keep = max(1, int(density * n + 1e-9))
    top = min(int(gamma * n + 1e-9), n - keep)
    order = np.argsort(-np.abs(tau))
    found = np.zeros_like(tau)
    found[order[top : top + keep]] = tau[order[top : top + keep]]
    return found


def sce(base: Vector, models: Sequence[Vector], fraction: float) -> Vector:
    """Select, calculate, erase (2408.07990)."""
    taus = np.stack([model - base for model in models])
    if fraction < 1:
        variance = taus.var(axis=0)
        kept = int(np.count_nonzero(variance) * fraction)
        mask = np.zeros(base.size, dtype=bool)
        mask[np.argsort(-variance)[:kept]] = True
        taus = taus * mask
    weights = (taus**2).sum(axis=1)
    weights = weights / weights.sum()
    signs = np.where(taus.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(taus) == signs
    below = (agree * weights[:, None]).sum(axis=0)
    found: Vector = base + (taus * agree * weights[:, None]).sum(axis=0) / np.where(below == 0, 1, below)
    return found


def ram(base: Vector, models: Sequence[Vector], epsilon: float, factors: Sequence[float]) -> Vector:
    """RAM (2601.13572), an element at a time."""
    found = base.copy()
    for i in range(base.size):
        changed = [(model[i] - base[i], f) for model, f in zip(models, factors, strict=True)]
        changed = [(tau, f) for tau, f in changed if abs(tau) > epsilon]
        if len(changed) == 1:
            found[i] += changed[0][0] * changed[0][1]
        elif changed:
            found[i] += sum(tau for tau, _ in changed) / len(changed)
    return found


def overlap_factors(
    base: Vector, models: Sequence[Vector], epsilon: float, r: float, alpha: float
) -> list[float]:
    """RAM+'s factors: what others changed too, over what only one changed."""
    active = np.stack([np.abs(model - base) > epsilon for model in models])
    count = active.sum(axis=0)
    return [
        1 + r * min((row & (count > 1)).sum() / max(1, (row & (count == 1)).sum()), alpha) for row in active
    ]


def agreed(
    base: Vector, models: Sequence[Vector], weights: Sequence[float], strict: Sequence[float], agreement: int
) -> Vector:
    """Consensus merging (2405.07813), an element at a time."""
    taus = [model - base for model in models]
    total = sum(w * tau for w, tau in zip(weights, taus, strict=True))
    votes = sum(
        (np.abs(tau) >= least * np.abs(total - tau)).astype(int)
        for tau, least in zip(taus, strict, strict=True)
    )
    found: Vector = base + np.where(votes >= agreement, total, 0.0)
    return found


def fused(base: Vector, model: Vector) -> Vector:
    """Arcee Fusion of two matrices, by scipy-free softmax and sorted quartiles."""

    def log_softmax(x: Vector) -> Vector:
        shifted = x - x.max(axis=-1, keepdims=True)
        out: Vector = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return out

    p, q = log_softmax(base), log_softmax(model)
    score = np.abs(model - base) * (np.exp(q) * (q - p)).sum(axis=-1, keepdims=True)
    low, mid, high = (np.percentile(score, share, method="lower") for share in (25, 50, 75))
    found: Vector = np.where(score >= mid + 1.5 * (high - low), model, base)
    return found
