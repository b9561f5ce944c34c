"""What ``della`` and ``della_linear`` share: MagPrune (2406.11617), and what becomes of what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from workers.kernels.base import Term
from workers.kernels.scalars import weight_sum
from workers.methods.base import Tensors, Whole
from workers.methods.common import Fraction01, Rescale, SparseModel, TaskVectorParameters
from workers.methods.elect import ElectingParameters
from workers.task import Facts

if TYPE_CHECKING:
    import torch

Chances = Literal["half_width", "width"]


class DellaModel(SparseModel):
    """Parameters of each model."""

    density: Fraction01 = 1.0
    """The fraction of the task vector's elements that is kept, on the average: random ones, of each row (along the last
    dimension) rather its large than its small ones."""
    epsilon: Fraction01 = 0.15
    """How far the chance to stay goes below the density for a row's smallest element, and above it for its largest; see
    `chances`. Neither may be a chance of 0 or 1."""

    @model_validator(mode="after")
    def _are_chances(self) -> Self:
        if 0 < self.density < 1 and not self.epsilon < min(self.density, 1 - self.density):
            raise ValueError(
                f"epsilon {self.epsilon} is too large for density {self.density}: "
                "density - epsilon must be above 0 and density + epsilon below 1"
            )
        return self


def chances_of(model: DellaModel, count: int, chances: Chances) -> torch.Tensor:
    """The chance to stay of each of a row's ``count`` elements, by rank of their magnitudes, the smallest first."""
    import torch  # noqa: PLC0415 - whoever only plans needs no torch

    ranks = torch.arange(count, dtype=torch.float64)
    if count == 1:
        return ranks + model.density
    if (
        chances == "width"
    ):  # the paper: drop with 1 - density - epsilon/2 + epsilon/n · (rank from the largest)
        from_largest = ranks.neg_().add_(count - 1).div_(count)
        return from_largest.neg_().add_(0.5).mul_(model.epsilon).add_(model.density)
    low, step = model.density - model.epsilon, 2 * model.epsilon / (count - 1)
    return ranks.mul_(step).add_(low)


def pruning(
    parameters: TaskVectorParameters, rescale: Rescale, chances: Chances, models: Sequence[DellaModel]
) -> Whole | None:
    """How whole tensors are merged; ``None`` where no model has elements to draw, which a formula can do."""
    if not any(0 < model.density < 1 for model in models):
        return None

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels import reference  # noqa: PLC0415 - whoever only plans needs no torch
        from workers.kernels.magprune import pruned  # noqa: PLC0415

        base = tensors.base
        if base is None:
            raise ValueError("task vectors need the base model's elements")
        width = base.shape[-1] if base.dim() else 1
        vectors = []
        for model, elements, key in zip(models, tensors.models, tensors.mask_keys, strict=True):
            if 0 < model.density < 1:
                vectors.append(pruned(base, elements, chances_of(model, width, chances), key, rescale))
            else:
                whole = (reference.to_float32(elements) - reference.to_float32(base)).flatten()
                vectors.append(whole if model.density else whole - whole)
        weights = [model.weight for model in models]
        weighted = reference.weigh(vectors, weights)
        merged = reference.accumulate(weighted)
        if isinstance(parameters, ElectingParameters):
            divisor = parameters.divisor if parameters.normalize else None
            merged = reference.disjoint_merge(weighted, weights, reference.elect(merged), divisor)
        elif parameters.normalize:
            merged = reference.divide(merged, weight_sum(weights))
        merged = reference.scale(merged, parameters.lambda_).reshape(base.shape)
        return reference.to_float32(base) + merged

    return Whole(merge, 64 + 8 * len(models))


def undrawn(models: Sequence[DellaModel], facts: Facts) -> tuple[Term, ...]:
    """The terms where all is kept of a model, or nothing."""
    return tuple(
        Term(index, model.weight, keep_below=1 << 32 if model.density else 0)
        for index, model in enumerate(models)
    )
