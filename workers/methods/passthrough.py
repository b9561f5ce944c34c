"""Passthrough: one model, or its layers, as it is, its dtype maybe changed, or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula, Term
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters, Real
from workers.task import Facts


class ScaledModel(Parameters):
    """The parameter of a model that is passed through."""

    scale: Real = 1.0
    """What its elements are multiplied by; 1 copies them."""


def formula(parameters: NoParameters, models: Sequence[ScaledModel], facts: Facts) -> Formula:
    """The model itself, times its scale."""
    return Formula((Term(0, models[0].scale),))


PASSTHROUGH = Method(
    name="passthrough",
    summary="Copies one model, or its layers, maybe scaled.",
    paper="arXiv:2403.13257",
    parameters=NoParameters,
    model_parameters=ScaledModel,
    formula=formula,
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    copies=True,
    reads_as="θ = scale · θ₁",
)
