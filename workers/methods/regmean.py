"""RegMean: of each linear layer the weights whose outputs are nearest to those of all models (2212.09849)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters, Statistic, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, Fraction01, normalizer, terms_alone
from workers.methods.fisher import FisherModel
from workers.task import Facts

if TYPE_CHECKING:
    import torch

MATRIX_BYTES = 96
"""Workspace bytes for each element of a layer's matrix; see :mod:`workers.kernels.regression`."""
GRAM_BYTES = 64
"""Workspace bytes for each element of one Gram matrix, besides."""


class RegMeanParameters(Parameters):
    """Global parameters of ``regmean``."""

    alpha: Fraction01 = 0.9
    """What a Gram matrix's elements off the diagonal are multiplied by: 0 weighs each input by itself, 1 trusts its
    correlations with others. The paper takes 0.9, and 0.1 for T5."""
    fan_in_fan_out: bool = False
    """Whether the matrices are `[in, out]`, as in GPT-2's layers, and not `[out, in]`; a Gram matrix is `[in, in]`."""


def gram_shape(parameters: RegMeanParameters, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The Gram matrix of a layer of this shape; none of what is no matrix."""
    if len(shape) != 2:
        return None
    inputs = shape[0] if parameters.fan_in_fan_out else shape[1]
    return inputs, inputs


def whole(parameters: RegMeanParameters, models: Sequence[FisherModel]) -> Whole:
    """The whole matrix at once."""
    weights = [model.weight for model in models]

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.regression import regression_mean  # noqa: PLC0415 - whoever only plans needs no torch

        return regression_mean(
            tensors.models, tensors.statistics, weights, parameters.alpha, parameters.fan_in_fan_out
        )

    return Whole(merge, MATRIX_BYTES, GRAM_BYTES)


def formula(parameters: RegMeanParameters, models: Sequence[FisherModel], facts: Facts) -> Formula:
    """The mean of the models: there are no parameters under which this is asked."""
    terms = terms_alone(len(models))
    return Formula(terms, divide=normalizer(terms, normalize=True))


REGMEAN = Method(
    name="regmean",
    summary="Solves for the weights of each linear layer whose outputs are nearest to those of all models.",
    paper="arXiv:2212.09849",
    parameters=RegMeanParameters,
    model_parameters=FisherModel,
    formula=formula,
    whole=whole,
    statistic=Statistic("gram", gram_shape, without="linear", is_sparse=True),
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="W = (Σ wᵢ·Wᵢ·Gᵢ) · (Σ wᵢ·Gᵢ)⁻¹ for W of `[out, in]`, with Gᵢ = XᵢᵀXᵢ each model's `gram`, its elements "
    "off the diagonal times `alpha`; tensors without a Gram matrix, and what none determines, are averaged",
)
