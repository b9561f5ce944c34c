"""Model Breadcrumbs: drop the largest and the smallest of each task vector, and add up the rest (2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.band import Band, BandCount
from workers.methods.base import Method, SurveyPass
from workers.methods.common import Fraction01, SparseModel, TaskVectorParameters, terms_of, weighted_sum
from workers.task import Facts


class BreadcrumbsModel(SparseModel):
    """Parameters of each model."""

    density: Fraction01 = 1.0
    """The fraction of the task vector's elements that is kept, of each tensor: those between the largest ones that
    `gamma` drops and the smallest ones."""
    gamma: Fraction01 = 0.01
    """The fraction of the task vector's elements, its largest, that is dropped; less, where `density` would not else be
    kept."""


class BreadcrumbsParameters(TaskVectorParameters):
    """Global parameters of ``breadcrumbs``."""

    band_count: BandCount = "exact"
    """How many of n elements a fraction is: `exact`, its floor as the number is written, and at least 1 is kept;
    `mergekit`, int(fraction·n) in floats, so that a small tensor may lose all. Equal magnitudes are kept or dropped
    together."""


def band_of(
    parameters: BreadcrumbsParameters | TaskVectorParameters,
    models: Sequence[BreadcrumbsModel],
    count: BandCount,
) -> Band:
    """What of the models' task vectors stays."""
    return Band(
        terms_of(models),
        tuple(model.density for model in models),
        tuple(model.gamma for model in models),
        count,
    )


def survey(parameters: BreadcrumbsParameters, models: Sequence[BreadcrumbsModel]) -> tuple[SurveyPass, ...]:
    """The passes that find the thresholds."""
    return band_of(parameters, models, parameters.band_count).passes()


def formula(parameters: BreadcrumbsParameters, models: Sequence[BreadcrumbsModel], facts: Facts) -> Formula:
    """Base + lambda times the weighted sum of the task vectors' middles."""
    return weighted_sum(band_of(parameters, models, parameters.band_count).terms(facts), parameters)


BREADCRUMBS = Method(
    name="breadcrumbs",
    summary="Drops the largest and the smallest changes of each task vector and adds the rest to the base.",
    paper="arXiv:2312.06795",
    parameters=BreadcrumbsParameters,
    model_parameters=BreadcrumbsModel,
    formula=formula,
    survey=survey,
    base="required",
    profiles={"paper": {}, "mergekit": {"band_count": "mergekit"}},
    reads_as="θ = θ_base + lambda · Σ wᵢ·τ̂ᵢ (over Σ wᵢ with `normalize`); τ̂ is the density·n magnitudes of τ "
    "that come after its gamma·n largest",
    example={"density": 0.5},
)
