"""Multi-SLERP: the weighted mean of any number of directions, at the weighted mean of the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from workers.kernels.base import Formula
from workers.kernels.scalars import weight_sum
from workers.methods.base import Method, Parameters, SurveyPass
from workers.methods.common import NO_PROFILE_DIFFERENCES, Real, WeightedModel
from workers.methods.spans import DotProducts, combination, spherical_mean
from workers.task import Facts


class MultislerpParameters(Parameters):
    """Global parameters of ``multislerp``."""

    normalize_weights: bool = True
    """Whether weights are divided by their sum; one that vanishes divides by 1."""
    eps: Real = Field(default=1e-8, exclude=True)
    """Accepted for mergekit's recipes and ignored: float64 needs no guard against small lengths."""


def survey(parameters: MultislerpParameters, models: Sequence[WeightedModel]) -> tuple[SurveyPass, ...]:
    """The pass that measures lengths and angles."""
    weights = [model.weight for model in models]
    divisor = weight_sum(weights) if parameters.normalize_weights else 1.0
    solve = partial(spherical_mean, weights=[weight / divisor for weight in weights])
    return (DotProducts(len(models), None, solve),)


def formula(parameters: MultislerpParameters, models: Sequence[WeightedModel], facts: Facts) -> Formula:
    """The mean, as a weighted sum."""
    return combination(facts, None)


MULTISLERP = Method(
    name="multislerp",
    summary="Takes the weighted mean of the models' directions, at the weighted mean of their lengths.",
    paper="mergekit's documentation; goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=MultislerpParameters,
    model_parameters=WeightedModel,
    formula=formula,
    survey=survey,
    base="optional",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = (Σ wᵢ·‖vᵢ‖) · m/‖m‖ with m = Σ wᵢ·vᵢ/‖vᵢ‖; Σ wᵢ·vᵢ where m vanishes; v are the models, or with a "
    "base their task vectors, and the base is added back",
)
