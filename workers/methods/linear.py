"""Linear: the weighted average of whole models (model soups, 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.kernels import reference
from workers.methods.base import Block, Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, WeightedModel
from workers.methods.elect import weights_of
from workers.task import Facts


class LinearParameters(Parameters):
    """Global parameters of ``linear``."""

    normalize: bool = True
    """Whether to divide by the sum of the weights; one that vanishes divides by 1."""


def merge(
    block: Block, parameters: LinearParameters, models: Sequence[WeightedModel], facts: Facts
) -> torch.Tensor:
    """The weighted sum of the models, over the sum of the weights when normalised."""
    weights = weights_of(models)
    total = reference.accumulate(reference.weigh(block.models, weights))
    return reference.divide(total, reference.weight_sum(weights)) if parameters.normalize else total


LINEAR = Method(
    name="linear",
    summary="Weighted average of the models.",
    paper="arXiv:2203.05482",
    parameters=LinearParameters,
    model_parameters=WeightedModel,
    merge=merge,
    profiles=NO_PROFILE_DIFFERENCES,
)
