"""Passthrough: one model as it is, its dtype maybe changed, or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from workers.kernels.base import Formula, Term
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters, Real
from workers.task import Facts


def _or_one(value: Any) -> Any:
    return 1.0 if value is None else value


class ScaledModel(Parameters):
    """The parameter of the model."""

    scale: Annotated[Real, BeforeValidator(_or_one)] = 1.0
    """What its elements are multiplied by; 1 (or `null`) copies them."""


def formula(parameters: NoParameters, models: Sequence[ScaledModel], facts: Facts) -> Formula:
    """The model itself, times its scale."""
    return Formula((Term(0, models[0].scale),))


PASSTHROUGH = Method(
    name="passthrough",
    summary="Copies one model, maybe scaled.",
    paper="arXiv:2403.13257",
    parameters=NoParameters,
    model_parameters=ScaledModel,
    formula=formula,
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    copies=True,
    reads_as="θ = scale · θ₁",
)
