"""Task singular vectors: the largest of each task, kept out of each other's way (TSV-M, 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from workers.kernels.base import Formula
from workers.methods.base import Method, Parameters, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, Real, WeightedModel, terms_of
from workers.task import Facts

if TYPE_CHECKING:
    import torch

SPECTRAL_BYTES = 320
"""Workspace bytes for each element; see :mod:`workers.kernels.spectra`."""


class SpectralParameters(Parameters):
    """Global parameters of the methods that decompose matrices."""

    lambda_: Real = Field(default=1.0, alias="lambda")
    """What the merged task vector is multiplied by before it is added to the base."""


def whole(parameters: SpectralParameters, models: Sequence[WeightedModel]) -> Whole:
    """The whole matrix at once."""
    weights = [model.weight for model in models]

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.spectra import singular_merge  # noqa: PLC0415 - whoever only plans needs no torch

        if tensors.base is None:
            raise ValueError("task vectors need the base model's elements")
        return singular_merge(tensors.base, tensors.models, weights, parameters.lambda_)

    return Whole(merge, SPECTRAL_BYTES + 24 * len(models))


def formula(parameters: SpectralParameters, models: Sequence[WeightedModel], facts: Facts) -> Formula:
    """The mean of the task vectors: there are no parameters under which this is asked."""
    return Formula(terms_of(models), task_vectors=True, divide=float(len(models)), lambda_=parameters.lambda_)


TSV = Method(
    name="tsv",
    summary="Puts together the largest singular vectors of each task vector, made orthogonal to the others'.",
    paper="arXiv:2412.00081",
    parameters=SpectralParameters,
    model_parameters=WeightedModel,
    formula=formula,
    whole=whole,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + lambda · U⊥·Σ·V⊥ with U, Σ, V the first min(m, n)/N singular vectors and values (times "
    "wᵢ) of each of N task matrices side by side, and ⊥ the nearest orthogonal matrix; vectors are averaged",
)
