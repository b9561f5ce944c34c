"""Linear: the weighted average of whole models (model soups, 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, WeightedModel, normalizer, terms_of
from workers.task import Facts


class LinearParameters(Parameters):
    """Global parameters of ``linear``."""

    normalize: bool = True
    """Whether to divide by the sum of the weights; one that vanishes divides by 1."""


def formula(parameters: LinearParameters, models: Sequence[WeightedModel], facts: Facts) -> Formula:
    """The weighted sum of the models, over the sum of the weights when normalised."""
    terms = terms_of(models)
    return Formula(terms, divide=normalizer(terms, parameters.normalize))


LINEAR = Method(
    name="linear",
    summary="Weighted average of the models.",
    paper="arXiv:2203.05482",
    parameters=LinearParameters,
    model_parameters=WeightedModel,
    formula=formula,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = Σ wᵢ·θᵢ (over Σ wᵢ with `normalize`)",
)
