"""Task arithmetic: the base plus a weighted sum of task vectors (2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.base import Method
from workers.methods.common import (
    NO_PROFILE_DIFFERENCES,
    TaskVectorParameters,
    WeightedModel,
    terms_of,
    weighted_sum,
)
from workers.task import Facts


def formula(parameters: TaskVectorParameters, models: Sequence[WeightedModel], facts: Facts) -> Formula:
    """Base + lambda times the weighted sum, over the sum of the weights when normalised."""
    return weighted_sum(terms_of(models), parameters)


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="Adds the weighted task vectors to the base model.",
    paper="arXiv:2212.04089",
    parameters=TaskVectorParameters,
    model_parameters=WeightedModel,
    formula=formula,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + lambda · Σ wᵢ·τᵢ (over Σ wᵢ with `normalize`), τᵢ = θᵢ − θ_base; a negative "
    "weight takes away",
)
