"""NuSLERP: spherical interpolation by weights, of models or of task vectors, of tensors or of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters, SurveyPass, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, WeightedModel
from workers.methods.spans import DotProducts, combination, turned
from workers.task import Facts

if TYPE_CHECKING:
    import torch


class NuslerpParameters(Parameters):
    """Global parameters of ``nuslerp``."""

    nuslerp_flatten: bool = True
    """Whether a tensor is one vector (`true`), or each of its rows or columns is one."""
    nuslerp_row_wise: bool = False
    """Without `nuslerp_flatten`: whether vectors run along the first dimension (`true`) or along the last."""


def _t(models: Sequence[WeightedModel]) -> float:
    total = models[0].weight + models[1].weight
    return models[1].weight / total if abs(total) > 1e-8 else 0.5


def survey(parameters: NuslerpParameters, models: Sequence[WeightedModel]) -> tuple[SurveyPass, ...]:
    """The pass that measures the angle."""
    return (DotProducts(2, None, partial(turned, t=_t(models))),)


def formula(parameters: NuslerpParameters, models: Sequence[WeightedModel], facts: Facts) -> Formula:
    """The first vector turned towards the second."""
    return combination(facts, None)


def whole(parameters: NuslerpParameters, models: Sequence[WeightedModel]) -> Whole | None:
    """Where rows or columns are turned one by one: the whole tensor at once."""
    if parameters.nuslerp_flatten:
        return None
    t, dimension = _t(models), 0 if parameters.nuslerp_row_wise else -1

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.rows import turn_rows  # noqa: PLC0415 - whoever only plans needs no torch

        return turn_rows(tensors.base, tensors.models, t, dimension)

    return Whole(merge, 64)


NUSLERP = Method(
    name="nuslerp",
    summary="Interpolates between two models, or their task vectors, along a great circle, by weights.",
    paper="Shoemake 1985, doi:10.1145/325165.325242; mergekit's documentation",
    parameters=NuslerpParameters,
    model_parameters=WeightedModel,
    formula=formula,
    survey=survey,
    whole=whole,
    base="optional",
    min_models=2,
    max_models=2,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = sin((1−t)·Ω)/sin Ω · v₁ + sin(t·Ω)/sin Ω · v₂ with t = w₂/(w₁+w₂) and Ω the angle between them; v "
    "are the models, or with a base their task vectors, and the base is added back",
)
