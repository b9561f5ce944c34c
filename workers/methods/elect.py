"""TIES' second and third step as methods use them: elect signs, merge what agrees, add it to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.kernels import base, reference
from workers.methods.base import Block, Summary, SurveyPass
from workers.methods.common import TaskVectorParameters, WeightedModel, ZeroSign, base_of
from workers.methods.trim import Vectors
from workers.task import Facts


class ElectingParameters(TaskVectorParameters):
    """Global parameters of the methods that elect a sign."""

    zero_sign: ZeroSign = "positive"
    """The sign elected where the weighted sum is exactly zero: ``+``, or the tensor's majority."""
    divisor: base.Divisor = "abs_weights"
    """What ``normalize`` divides by, over the agreeing models."""


@dataclass(frozen=True, slots=True)
class ElectedSigns(SurveyPass):
    """The balance of the signs that a tensor elects. Adds ``zero_sign``: 1, or -1 on a tie as the authors do.

    A summary is the number of elements that elect ``+`` less those that elect ``-``.
    """

    vectors: Vectors
    """The vectors that elect: sparsified, not yet weighted."""
    weights: tuple[float, ...]
    """Their weights."""

    def summarise(self, block: Block, facts: Facts) -> Summary:
        finite = [reference.finite_or_zero(vector) for vector in self.vectors(block, facts)]
        total = reference.accumulate(reference.weigh(finite, self.weights))
        return int(torch.count_nonzero(total > 0)) - int(torch.count_nonzero(total < 0))

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return sum(summaries)

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        return {"zero_sign": 1 if summary > 0 else -1}


def election_passes(
    parameters: ElectingParameters, weights: tuple[float, ...], vectors: Vectors
) -> tuple[SurveyPass, ...]:
    """The pass that finds the sign of zero sums; none when it is always ``+``."""
    return (ElectedSigns(vectors, weights),) if parameters.zero_sign == "majority" else ()


def add_consensus(
    block: Block,
    vectors: Sequence[torch.Tensor],
    parameters: ElectingParameters,
    models: Sequence[WeightedModel],
    facts: Facts,
) -> torch.Tensor:
    """The base plus lambda times the consensus of sparse task ``vectors``."""
    merged = reference.consensus(
        vectors,
        weights_of(models),
        facts["zero_sign"] if parameters.zero_sign == "majority" else 1,
        parameters.divisor if parameters.normalize else None,
    )
    return base_of(block) + reference.scale(merged, parameters.lambda_)


def add_sum(
    block: Block,
    vectors: Sequence[torch.Tensor],
    parameters: TaskVectorParameters,
    models: Sequence[WeightedModel],
) -> torch.Tensor:
    """The base plus lambda times the weighted sum of task ``vectors``."""
    weights = weights_of(models)
    merged = reference.accumulate(reference.weigh(vectors, weights))
    if parameters.normalize:
        merged = reference.divide(merged, reference.weight_sum(weights))
    return base_of(block) + reference.scale(merged, parameters.lambda_)


def weights_of(models: Sequence[Any]) -> tuple[float, ...]:
    """The models' weights."""
    return tuple(model.weight for model in models)


def densities_of(models: Sequence[Any]) -> tuple[float, ...]:
    """The models' densities."""
    return tuple(model.density for model in models)
