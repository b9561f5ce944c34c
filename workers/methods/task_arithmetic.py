"""Task arithmetic: the base plus a weighted sum of task vectors (2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.methods.base import Block, Method
from workers.methods.common import (
    NO_PROFILE_DIFFERENCES,
    TaskVectorParameters,
    WeightedModel,
    task_vectors,
)
from workers.methods.elect import add_sum
from workers.task import Facts


def merge(
    block: Block, parameters: TaskVectorParameters, models: Sequence[WeightedModel], facts: Facts
) -> torch.Tensor:
    """Base + lambda times the weighted sum, over the sum of the weights when normalised."""
    return add_sum(block, task_vectors(block), parameters, models)


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="Adds the weighted task vectors to the base model.",
    paper="arXiv:2212.04089",
    parameters=TaskVectorParameters,
    model_parameters=WeightedModel,
    merge=merge,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
)
