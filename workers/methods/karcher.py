"""The Karcher mean: the point of the sphere whose squared angles to all models are least, at their mean length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters, SurveyPass
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters
from workers.methods.spans import DotProducts, combination, karcher_mean
from workers.task import Facts


class KarcherParameters(Parameters):
    """Global parameters of ``karcher``."""

    max_iter: Annotated[int, Field(ge=0, le=1000)] = 10
    """Most steps towards the mean."""
    tol: Annotated[float, Field(ge=0, le=1)] = 1e-5
    """The step, in radians, at which to stop; models nearer to the mean than this do not pull."""


def survey(parameters: KarcherParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The pass that measures lengths and angles."""
    solve = partial(karcher_mean, max_iter=parameters.max_iter, tol=parameters.tol)
    return (DotProducts(len(models), False, solve),)


def formula(parameters: KarcherParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The mean, as a weighted sum."""
    return combination(facts, False)


KARCHER = Method(
    name="karcher",
    summary="Takes the Karcher mean of the models' directions, at the mean of their lengths.",
    paper="Karcher 1977, doi:10.1002/cpa.3160300502; arXiv:2603.04972",
    parameters=KarcherParameters,
    model_parameters=NoParameters,
    formula=formula,
    survey=survey,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = mean(‖θᵢ‖) · argmin over unit m of Σ ∠(m, θᵢ)², by steps along the mean tangent from the "
    "directions' mean",
)
