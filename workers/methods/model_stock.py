"""Model Stock: as far from the base to the models' mean as their angles say (2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters, SurveyPass, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters
from workers.methods.spans import DotProducts, combination, stock
from workers.task import Facts

if TYPE_CHECKING:
    import torch


class ModelStockParameters(Parameters):
    """Global parameters of ``model_stock``."""

    filter_wise: bool = False
    """Whether each row of a tensor (along its last dimension) has an angle of its own."""


def survey(parameters: ModelStockParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The pass that measures the angles between task vectors."""
    return (DotProducts(len(models), True, stock),)


def formula(parameters: ModelStockParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The base, plus so much of the mean of the task vectors."""
    return combination(facts, True)


def whole(parameters: ModelStockParameters, models: Sequence[NoParameters]) -> Whole | None:
    """Where each row has its own angles: the whole tensor at once."""
    if not parameters.filter_wise:
        return None

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.rows import stock_rows  # noqa: PLC0415 - whoever only plans needs no torch

        return stock_rows(tensors.base, tensors.models)

    return Whole(merge, 40 + 8 * len(models))


MODEL_STOCK = Method(
    name="model_stock",
    summary="Goes from the base towards the models' mean, as far as the angles between their task vectors say.",
    paper="arXiv:2403.19522",
    parameters=ModelStockParameters,
    model_parameters=NoParameters,
    formula=formula,
    survey=survey,
    whole=whole,
    base="required",
    min_models=2,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + t · mean(τᵢ) with t = N·c/(1 + (N−1)·c) and c the mean cosine between two task vectors",
)
