"""TIES, DARE and SLERP once more, in float64 numpy and straight from the papers: what the tests compare with.

Nothing here imports a kernel. Where a decision hangs on an exact comparison (a threshold, a zero sum), the
tests use dyadic inputs and weights, for which float32 and float64 agree exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def kept(density: float, n: int, rule: str) -> int:
    if density == 1:
        return n
    if rule == "paper":
        return min(n, int(density * n) + 1)
    if density == 0:
        return 0
    count = int(density * n) if rule == "mergekit" else int(Fraction(str(density)) * n)
    return max(1, count)


def trimmed(tau: Vector, density: float, rule: str = "exact", equals: str = "keep") -> Vector:
    k = kept(density, tau.size, rule)
    if k == 0:
        return np.zeros_like(tau)
    order = np.argsort(-np.abs(tau), kind="stable")  # the lowest index first among equals
    if equals == "exact_k":
        keep = np.zeros(tau.size, dtype=bool)
        keep[order[:k]] = True
    else:
        keep = np.abs(tau) >= np.abs(tau)[order[k - 1]]
    return np.where(keep, tau, 0.0)


def elected(taus: Sequence[Vector], weights: Sequence[float], zero_sign: str) -> Vector:
    total = np.sum([w * t for w, t in zip(weights, taus, strict=True)], axis=0)
    signs: Vector = np.sign(total)
    if zero_sign == "positive":
        signs[signs == 0] = 1
    else:
        signs[signs == 0] = 1 if signs.sum() > 0 else -1
    return signs


def merged(taus: Sequence[Vector], weights: Sequence[float], signs: Vector, divisor: str | None) -> Vector:
    out = np.zeros_like(taus[0])
    for i in range(out.size):
        agreeing = [(w, t[i]) for w, t in zip(weights, taus, strict=True) if np.sign(w * t[i]) == signs[i]]
        total = sum(w * t for w, t in agreeing)
        below = {
            None: 1.0,
            "abs_weights": sum(abs(w) for w, _ in agreeing),
            "count": float(len(agreeing)),
            "weights": sum(w for w, _ in agreeing),
        }[divisor]
        out[i] = total / (below or 1.0)
    return out


def ties(
    base: Vector,
    models: Sequence[Vector],
    weights: Sequence[float],
    densities: Sequence[float],
    **switches: Any,
) -> Vector:
    normalize = switches.get("normalize", True)
    taus = [
        trimmed(
            model - base,
            density,
            switches.get("keep_count", "exact"),
            switches.get("equal_magnitudes", "keep"),
        )
        for model, density in zip(models, densities, strict=True)
    ]
    signs = elected(taus, weights, switches.get("zero_sign", "positive"))
    divisor = switches.get("divisor", "abs_weights") if normalize else None
    factor: float = switches.get("lambda_", 1.0)
    return base + factor * merged(taus, weights, signs, divisor)


def sparse(tau: Vector, mask: npt.NDArray[np.bool_], density: float, rescale: str) -> Vector:
    kept_part = np.where(mask, tau, 0.0)
    if rescale == "none" or density in (0, 1):
        return kept_part
    if rescale == "inverse":
        return kept_part / density
    before, after = np.abs(tau).sum(), np.abs(kept_part).sum()
    return kept_part if min(before, after) < 1e-7 else kept_part * (before / after)


def slerp(a: Vector, b: Vector, t: float) -> Vector:
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) == 0:
        return (1 - t) * a + t * b
    cosine = float(np.clip(a @ b / norms[0] / norms[1], -1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    turned: Vector = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return turned


def authors_ties(
    base: Mapping[str, Vector],
    models: Sequence[Mapping[str, Vector]],
    density: float,
    lambda_: float = 1.0,
) -> dict[str, Vector]:
    """TIES as its authors run it: whole models flattened, one threshold each, their zero-sum rule, the mean."""
    names = sorted(base)
    flat = np.stack([np.concatenate([model[n].ravel() - base[n].ravel() for n in names]) for model in models])
    d = flat.shape[1]
    kth = np.sort(np.abs(flat), axis=1)[:, d - int(d * density) - 1]  # the k-th smallest, from 1
    flat = flat * (np.abs(flat) >= kth[:, None])
    signs = np.sign(flat.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agreeing = flat * np.where(signs > 0, flat > 0, flat < 0)
    mean = agreeing.sum(axis=0) / np.maximum((agreeing != 0).sum(axis=0), 1)
    ends = np.cumsum([base[n].size for n in names])[:-1]
    pieces = zip(names, np.split(mean, ends), strict=True)
    return {n: base[n] + lambda_ * piece.reshape(base[n].shape) for n, piece in pieces}
