"""SLERP: spherical interpolation between two models, each tensor taken as one vector (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.kernels import reference
from workers.methods.base import Block, Method, Parameters, Summary, SurveyPass
from workers.methods.common import NO_PROFILE_DIFFERENCES, Fraction01, NoParameters
from workers.task import SURVEY_ELEMENTS, Facts


class SlerpParameters(Parameters):
    """Global parameters of ``slerp``."""

    t: Fraction01
    """How far to go from the first model (0) to the second (1); at either end its elements exactly."""


@dataclass(frozen=True, slots=True)
class Angle(SurveyPass):
    """Both squared norms and the dot product. Adds ``slerp``: the two models' coefficients.

    A summary maps the block's number to the three sums.
    """

    t: float
    """How far to go."""

    def summarise(self, block: Block, facts: Facts) -> Summary:
        # In float64 the products of float32 values are exact.
        first, second = (reference.finite_or_zero(model).double() for model in block.models)
        sums = [reference.block_sum(x * y) for x, y in ((first, first), (second, second), (first, second))]
        return {str(block.first // SURVEY_ELEMENTS): sums}

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return {number: sums for summary in summaries for number, sums in summary.items()}

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        first, second, dot = (math.fsum(sums) for sums in zip(*summary.values(), strict=True))
        return {"slerp": list(reference.slerp_coefficients(self.t, first, second, dot))}


def survey(parameters: SlerpParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The pass that measures the angle; none at either end."""
    return (Angle(parameters.t),) if 0 < parameters.t < 1 else ()


def merge(
    block: Block, parameters: SlerpParameters, models: Sequence[NoParameters], facts: Facts
) -> torch.Tensor:
    """The first model turned towards the second; linear where they are nearly parallel or one is zero."""
    first, second = block.models
    if parameters.t in (0, 1):
        return second if parameters.t else first
    return reference.accumulate(reference.weigh((first, second), facts["slerp"]))


SLERP = Method(
    name="slerp",
    summary="Interpolates between two models along a great circle.",
    paper="Shoemake 1985, doi:10.1145/325165.325242",
    parameters=SlerpParameters,
    model_parameters=NoParameters,
    merge=merge,
    survey=survey,
    base="first_model",
    min_models=2,
    max_models=2,
    profiles=NO_PROFILE_DIFFERENCES,
)
