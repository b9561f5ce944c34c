"""What methods compute of numbers, not of elements: how many are kept, and what is multiplied and divided by.

Plain Python and float64 throughout, so that who only plans needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

KeepCount = Literal["exact", "paper", "mergekit"]
"""Whose rule says how many elements a trim keeps; see :func:`keep_count`."""

PARALLEL = 0.9995
"""Above this absolute cosine SLERP is linear interpolation."""
ZERO_NORM = 1e-8
"""At most this norm SLERP takes a vector for zero."""
ZERO_WEIGHTS = 1e-8
"""Below this absolute sum of weights, normalising divides by 1."""


def keep_count(density: float, numel: int, rule: KeepCount = "exact") -> int:
    """How many of ``numel`` elements a trim at ``density`` keeps.

    ``exact`` is floor(density * numel) in exact rationals, at least 1 unless the density is 0. ``paper`` is
    the authors' code, int(density * numel) + 1 in floats, even at density 0; ``mergekit`` is
    max(1, int(density * numel)) in floats, 0 at density 0. Density 1 keeps all under every rule.
    """
    if density >= 1:
        return numel
    if rule == "paper":
        return min(numel, int(density * numel) + 1)
    if density <= 0:
        return 0
    if rule == "mergekit":
        return max(1, int(density * numel))
    return max(1, Fraction(str(density)) * numel // 1)


def keep_bound(density: float) -> int:
    """What a 32-bit word must be below for its element to be kept: ``floor(density * 2**32)``.

    ``density`` is read as the decimal that it prints as. Of 1 the bound is ``2**32``, above every word.
    """
    return min(1 << 32, int(Fraction(str(density)) * (1 << 32) // 1))


def weight_sum(weights: Sequence[float]) -> float:
    """What a normalised weighted sum is divided by: the sum of the weights, or 1 where that vanishes."""
    total = math.fsum(weights)
    return total if abs(total) >= ZERO_WEIGHTS else 1.0


def slerp_coefficients(t: float, first: float, second: float, dot: float) -> tuple[float, float]:
    """What SLERP multiplies the two vectors by, given their squared norms and their dot product.

    Shoemake 1985. Linear interpolation where the vectors are nearly parallel or one of them is zero.
    """
    norms = math.sqrt(first), math.sqrt(second)
    if min(norms) <= ZERO_NORM:
        return 1 - t, t
    cosine = dot / norms[0] / norms[1]
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


ALMOST_PARALLEL = 6e-8
"""Within this of 1, a cosine's half unit in the last place of float32, NuSLERP is linear interpolation."""


def slerp_weights(t: float, angle: float) -> tuple[float, float]:
    """What spherical interpolation at ``t`` multiplies two vectors by that lie ``angle`` apart (radians)."""
    if abs(math.cos(angle)) > 1 - ALMOST_PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def stock_ratio(cosines: Sequence[float], models: int) -> float:
    """How far Model Stock goes from the base to the mean of the models (2403.19522), given the cosines between all
    pairs of their task vectors."""
    mean = math.fsum(cosines) / len(cosines)
    below = 1 + (models - 1) * mean
    return models * mean / below if abs(below) > 1e-8 else 0.0
