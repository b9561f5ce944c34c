"""KnOTS: align task matrices in their common singular directions, and merge them there by TIES (2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.kernels.base import Formula
from workers.methods.base import Method, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, Fraction01, SparseModel, terms_of
from workers.methods.tsv import SPECTRAL_BYTES, SpectralParameters
from workers.task import Facts

if TYPE_CHECKING:
    import torch

ALIGNED_BYTES = 80
"""Workspace bytes for each element of each model, besides: of a matrix as tall as all task matrices are wide together,
the task vectors take 4 and 8, they side by side, what LAPACK overwrites and both sides' vectors 8 each, and its
workspace 24 to 32."""


class KnotsModel(SparseModel):
    """Parameters of each model."""

    density: Fraction01 = 0.2
    """The fraction of the model's entries in the common directions that is kept: the largest, equal ones together."""


def whole(parameters: SpectralParameters, models: Sequence[KnotsModel]) -> Whole:
    """The whole matrix at once."""
    weights = [model.weight for model in models]
    densities = [model.density for model in models]

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.spectra import aligned_merge  # noqa: PLC0415 - whoever only plans needs no torch

        if tensors.base is None:
            raise ValueError("task vectors need the base model's elements")
        return aligned_merge(tensors.base, tensors.models, weights, densities, parameters.lambda_)

    return Whole(merge, SPECTRAL_BYTES + ALIGNED_BYTES * len(models))


def formula(parameters: SpectralParameters, models: Sequence[KnotsModel], facts: Facts) -> Formula:
    """The mean of the task vectors: there are no parameters under which this is asked."""
    return Formula(terms_of(models), task_vectors=True, divide=float(len(models)), lambda_=parameters.lambda_)


KNOTS = Method(
    name="knots",
    summary="Decomposes all task matrices together and merges what each has in the common directions by TIES.",
    paper="arXiv:2410.19735",
    parameters=SpectralParameters,
    model_parameters=KnotsModel,
    formula=formula,
    whole=whole,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + lambda · U·Σ·V̂ with U·Σ·[V₁ … V_N] the task matrices side by side, and V̂ the disjoint merge "
    "of `ties` of the Vᵢ, trimmed to their density; vectors are averaged",
)
