"""Some recipes once more, in float64 and from their definitions: of two tools that are apart, which is nearer?

Nothing here imports a kernel or a method, and vectors are turned and summed as vectors, not by their dot products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.oracle.compare import Distance, distance, scale_of

VANISHING = 1e-8
"""Below this a sum of weights, or a length on the unit sphere, is nothing to divide by."""

SMALL_ENERGIES = 1e-6
"""Up to this sum of mean squares, and for divisors up to this, mergekit's SCE does not divide by them."""


@dataclass(frozen=True, slots=True)
class Nearness:
    """How far both tools are from float64, in units of the bound as it is before it is widened."""

    ours: Distance = field(default_factory=Distance)
    """Mergemill's distance."""
    theirs: Distance = field(default_factory=Distance)
    """mergekit's."""

    def __add__(self, other: Nearness) -> Nearness:
        return Nearness(self.ours + other.ours, self.theirs + other.theirs)

    @property
    def verdict(self) -> str:
        """Whose rounding a wider bound makes room for."""
        if not self.ours.elements:
            return "not established"
        match self.ours.over > 0, self.theirs.over > 0:
            case False, True:
                return "mergekit's"
            case True, False:
                return "Mergemill's"
            case True, True:
                return "both tools'"
        return "both tools', each within the plain bound"


def nearness(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    method: str,
    parameters: Mapping[str, Any],
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    own: Sequence[Mapping[str, Any]],
) -> Nearness:
    """How far two results for one tensor are from float64's."""
    truth, unsure = exact(method, parameters, base, models, own)
    plain = scale_of(method, parameters, base, models, own, widened=False)
    return Nearness(distance(ours, truth, plain, unsure), distance(theirs, truth, plain, unsure))


def exact(
    method: str,
    parameters: Mapping[str, Any],
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    own: Sequence[Mapping[str, Any]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor merged in float64 as mergekit's profile says, and the elements that a rounding decides on.

    :raises ValueError: nobody needed this method in float64 so far.
    """
    start = torch.zeros(models[0].shape, dtype=torch.float64) if base is None else base.double()
    vectors = [model.double() - start for model in models]
    sure = torch.zeros(start.shape, dtype=torch.bool)
    weights = [float(each.get("weight", 1.0)) for each in own]
    match method:
        case "task_arithmetic":
            divisor = _divisor(weights) if parameters.get("normalize", False) else 1.0
            return start + parameters.get("lambda", 1.0) / divisor * _sum(weights, vectors), sure
        case "multislerp":
            divisor = _divisor(weights) if parameters.get("normalize_weights", True) else 1.0
            return start + _spherical_mean(vectors, [weight / divisor for weight in weights]), sure
        case "karcher":
            mean = _karcher_mean(vectors, int(parameters.get("max_iter", 10)), parameters.get("tol", 1e-5))
            return mean, sure
        case "sce":
            change, unsure = _sce(vectors, float(parameters.get("select_topk", 1.0)))
            return start + change, unsure
    raise ValueError(f"{method} is not among what is computed in float64")


def _sum(weights: Sequence[float], vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(0)


def _divisor(weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    return total if abs(total) >= VANISHING else 1.0


def _length(vector: torch.Tensor) -> float:
    return math.sqrt(float((vector * vector).sum()))


def _unit(vector: torch.Tensor) -> torch.Tensor:
    length = _length(vector)
    return vector / length if length > 0 else vector


def _spherical_mean(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean of the directions, as long as the weighted mean of the lengths."""
    mean = _sum(weights, [_unit(vector) for vector in vectors])
    if _length(mean) <= VANISHING * math.fsum(map(abs, weights)):
        return _sum(weights, vectors)
    length = math.fsum(weight * _length(vector) for weight, vector in zip(weights, vectors, strict=True))
    return length * _unit(mean)


def _karcher_mean(vectors: Sequence[torch.Tensor], max_iter: int, tol: float) -> torch.Tensor:
    """The Karcher mean of the directions, in as many steps as are asked for, at the mean of the lengths."""
    units = [_unit(vector) for vector in vectors if _length(vector) > 0]
    length = math.fsum(map(_length, vectors)) / len(vectors)
    if not units:
        return torch.zeros_like(vectors[0])
    mean = torch.stack(units).mean(0)
    mean = _unit(mean) if _length(mean) > VANISHING else units[0]
    for _ in range(max_iter):
        step = torch.stack([_tangent(mean, unit, tol) for unit in units]).mean(0)
        angle = _length(step)
        if angle < tol:
            break
        mean = math.cos(angle) * mean + math.sin(angle) * _unit(step)
    return length * mean


def _tangent(at: torch.Tensor, to: torch.Tensor, tol: float) -> torch.Tensor:
    """The way along the sphere from one unit vector to another: its direction, as long as the angle."""
    across = to - float((to * at).sum()) * at
    angle = math.atan2(_length(across), float((to * at).sum()))
    return angle * _unit(across) if angle > tol else torch.zeros_like(at)


def _sce(taus: Sequence[torch.Tensor], fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What SCE adds to the base, and where it may not be sure: of what stays, or of the sign that is elected."""
    stacked = torch.stack(list(taus))
    unsure = torch.zeros(stacked.shape[1:], dtype=torch.bool)
    if fraction < 1:
        variance = stacked.var(0, unbiased=False)
        kept = int(int(torch.count_nonzero(variance)) * fraction)
        if not kept:
            return torch.zeros_like(stacked[0]), unsure
        least = variance.flatten().sort(descending=True).values[kept - 1]
        unsure = (variance - least).abs() <= 1e-4 * least
        stacked = stacked * (variance >= least)
    energies = [float((tau * tau).mean()) for tau in stacked]
    total = math.fsum(energies)
    small = total <= SMALL_ENERGIES
    weights = [1 / len(energies) if small else energy / total for energy in energies]
    elected = stacked.sum(0)
    unsure |= (elected != 0) & (elected.abs() <= 1e-6 * stacked.abs().sum(0))
    agree = (stacked * torch.where(elected < 0, -1.0, 1.0) > 0).double()
    below = _sum(weights, list(agree)).clamp(min=SMALL_ENERGIES)
    return _sum(weights, list(stacked * agree)) / below, unsure
