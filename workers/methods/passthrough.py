"""Passthrough: one model as it is, its dtype maybe changed."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula, Term
from workers.methods.base import Method
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters
from workers.task import Facts


def formula(parameters: NoParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The model itself."""
    return Formula((Term(0),))


PASSTHROUGH = Method(
    name="passthrough",
    summary="Copies one model.",
    paper="arXiv:2403.13257",
    parameters=NoParameters,
    model_parameters=NoParameters,
    formula=formula,
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    copies=True,
)
