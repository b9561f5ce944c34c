"""How far two merges of one recipe are apart, in units of a bound that follows from the inputs.

The bound is ``1e-6 · (|θ_base| + Σ|w τ|)`` for methods on task vectors, ``1e-6 · Σ|w θ|`` for averages and
``1e-6 · (|θ_1| + |θ_2|)`` for SLERP: about sixteen float32 roundings of what is summed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RELATIVE = 1e-6

SLACK = {"multislerp": 10, "karcher": 2, "sce": 4}
"""How many times the bound is as wide for methods where the two tools are further apart; :mod:`tests.oracle.exact`
shows whose rounding that makes room for."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two sets of tensors are."""

    elements: int = 0
    """Elements compared."""
    differing: int = 0
    """Elements whose bits differ."""
    over: int = 0
    """Elements beyond the bound."""
    worst: float = 0.0
    """Largest error, in units of the bound."""
    undefined: int = 0
    """Elements left out: their magnitude equals the trim's threshold, and others' do."""

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.elements + other.elements,
            self.differing + other.differing,
            self.over + other.over,
            max(self.worst, other.worst),
            self.undefined + other.undefined,
        )


def distance(
    ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor, undefined: torch.Tensor
) -> Distance:
    """Compare two tensors of one shape, elementwise; NaN is never within the bound."""
    keep = ~undefined
    one, two, limit = ours[keep].double(), theirs[keep].double(), RELATIVE * scale[keep].double()
    error = (one - two).abs()
    # An error of zero is within any bound; anything else over a bound of zero is infinitely far.
    units = torch.where(error == 0, 0.0, error / limit).nan_to_num(nan=math.inf, posinf=math.inf)
    return Distance(
        elements=units.numel(),
        differing=int((ours[keep] != theirs[keep]).sum()),
        over=int((units > 1).sum()),
        worst=float(units.max()) if units.numel() else 0.0,
        undefined=int(undefined.sum()),
    )


def scale_of(
    method: str,
    parameters: Mapping[str, Any],
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    own: Sequence[Mapping[str, Any]],
    *,
    widened: bool = True,
) -> torch.Tensor:
    """What the bound is relative to, for one tensor, in float64.

    :param widened: with what :data:`SLACK` gives the method, and normalised weights that nearly cancel.
    """
    slack = SLACK.get(method, 1) if widened else 1
    wide = [model.double() for model in models]
    weights = [float(each.get("weight", 1.0)) for each in own]
    if method == "linear":
        divisor = abs(sum(weights)) if parameters.get("normalize", True) else 1.0
        return torch.stack([abs(w) / divisor * x.abs() for w, x in zip(weights, wide, strict=True)]).sum(0)
    if method == "passthrough":
        return abs(float(own[0].get("scale", 1.0))) * wide[0].abs()
    if method == "slerp" or (base is None and method in ("nuslerp", "multislerp", "karcher")):
        return slack * torch.stack([x.abs() for x in wide]).sum(0)
    if base is None:
        raise ValueError(f"{method} has no base")
    divisor = 1.0
    if method == "task_arithmetic" and parameters.get("normalize", False):
        divisor = abs(sum(weights))
        divisor = divisor if divisor >= 1e-8 else 1.0
        if widened:
            divisor /= cancelled(weights)
    vectors = [abs(w) / divisor * (x - base.double()).abs() for w, x in zip(weights, wide, strict=True)]
    return slack * (base.double().abs() + torch.stack(vectors).sum(0))


def cancelled(weights: Sequence[float]) -> float:
    """How many times as large as their sum weights are together: what that sum's own rounding is magnified by."""
    left = abs(sum(weights))
    return max(1.0, sum(map(abs, weights)) / left) if left >= 1e-8 else 1.0


def undefined_by_trim(
    base: torch.Tensor, models: Sequence[torch.Tensor], densities: Sequence[float]
) -> torch.Tensor:
    """Elements that a trim to exactly k may keep or drop as it likes: equals at the threshold.

    Zeros are never undefined: kept or dropped, they are zero.
    """
    found = torch.zeros(base.shape, dtype=torch.bool)
    for model, density in zip(models, densities, strict=True):
        size = (model.float() - base.float()).abs()
        kept = max(1, int(density * size.numel()))
        if not 0 < density < 1 or not size.numel():
            continue
        threshold = size.flatten().sort(descending=True).values[kept - 1]
        if threshold > 0 and int((size >= threshold).sum()) > kept:
            found |= size == threshold
    return found


def undefined_by_band(
    base: torch.Tensor, models: Sequence[torch.Tensor], own: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Elements that breadcrumbs may keep or drop as it likes: equals at either end of what stays."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    for model, each in zip(models, own, strict=True):
        size = (model.float() - base.float()).abs()
        n = size.numel()
        keep = int(each["density"] * n)
        top = min(int(each["gamma"] * n), n - keep)
        ordered = size.flatten().sort(descending=True).values
        for last in (top, top + keep):  # the border lies between it and the next
            if 0 < last < n and ordered[last - 1] == ordered[last] > 0:
                found |= size == ordered[last]
    return found


def undefined_by_importance(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Elements that Arcee Fusion may take or not as it likes: importances that rounding cannot tell from the least
    that counts, where a row's divergence is as uncertain as float32 makes it."""
    start, end = base.double(), model.double()
    below, above = (torch.log_softmax(x, dim=-1) for x in (start, end))
    divergence = (above.exp() * (above - below)).sum(dim=-1, keepdim=True)
    score = (end - start).abs() * divergence
    ordered = score.flatten().sort().values
    low, middle, high = (ordered[int((ordered.numel() - 1) * share)] for share in (0.25, 0.5, 0.75))
    least = middle + 1.5 * (high - low)
    return (score - least).abs() <= (1e-4 + 3e-6 / divergence.abs().clamp(min=1e-12)) * least


def undefined_by_variance(
    base: torch.Tensor, models: Sequence[torch.Tensor], fraction: float
) -> torch.Tensor:
    """Elements that SCE may select or not as it likes: variances that rounding cannot tell from the least kept."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    if fraction >= 1:
        return found
    taus = torch.stack([model.float() - base.float() for model in models]).double()
    variance = taus.var(0, unbiased=False)
    kept = int(int(torch.count_nonzero(variance)) * fraction)
    if not kept:
        return found
    least = variance.flatten().sort(descending=True).values[kept - 1]
    near = (variance - least).abs() <= RELATIVE * least
    return near if int(near.sum()) > 1 else found


@dataclass(frozen=True, slots=True)
class Mask:
    """What a DARE merge of one model kept."""

    elements: int
    """Elements whose task vector is big enough to tell."""
    kept: int
    """Of those, the ones that are not the base's."""
    over: int
    """Kept elements that are not base + factor · τ within the bound."""

    @property
    def fraction(self) -> float:
        """Share that was kept."""
        return self.kept / self.elements

    def sigmas(self, density: float) -> float:
        """How many standard deviations the share is from ``density``."""
        return abs(self.fraction - density) / math.sqrt(density * (1 - density) / self.elements)

    def __add__(self, other: Mask) -> Mask:
        return Mask(self.elements + other.elements, self.kept + other.kept, self.over + other.over)


def mask_of(
    merged: torch.Tensor, base: torch.Tensor, model: torch.Tensor, density: float, rescale: str
) -> Mask:
    """Read the mask off a merged tensor; ``rescale`` is ``inverse`` or ``l1``."""
    start, tau = base.double(), model.double() - base.double()
    changed = (merged.double() - start).abs() > 0.5 * tau.abs()
    # Too small to tell: the sum with the base rounds it away.
    telling = tau.abs() > 1e-5 * start.abs()
    factor = 1 / density
    if rescale == "l1":
        left = float(tau[changed].abs().sum())
        factor = float(tau.abs().sum()) / left if left else 0.0
    kept = changed & telling
    error = (merged.double() - (start + factor * tau)).abs()
    # mergekit sums its norms in float32, a few in 1e-6 off.
    limit = RELATIVE * start.abs() + 1e-5 * factor * tau.abs()
    return Mask(int(telling.sum()), int(kept.sum()), int((kept & (error > limit)).sum()))
