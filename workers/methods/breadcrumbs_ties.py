"""Model Breadcrumbs, then TIES' election: the middles of the task vectors, merged where signs agree (2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from workers.kernels.base import Formula
from workers.methods.band import BandCount
from workers.methods.base import Method, SurveyPass
from workers.methods.breadcrumbs import BreadcrumbsModel, band_of
from workers.methods.elect import ElectingParameters, consensus
from workers.task import Facts


class BreadcrumbsTiesParameters(ElectingParameters):
    """Global parameters of ``breadcrumbs_ties``."""

    zero_sign: Literal["positive"] = "positive"
    """The sign elected where the weighted sum is exactly zero: `positive`."""
    band_count: BandCount = "exact"
    """How many of n elements a fraction is: `exact`, its floor as the number is written, and at least 1 is kept;
    `mergekit`, int(fraction·n) in floats, so that a small tensor may lose all. Equal magnitudes are kept or dropped
    together."""


def survey(
    parameters: BreadcrumbsTiesParameters, models: Sequence[BreadcrumbsModel]
) -> tuple[SurveyPass, ...]:
    """The passes that find the thresholds."""
    return band_of(parameters, models, parameters.band_count).passes()


def formula(
    parameters: BreadcrumbsTiesParameters, models: Sequence[BreadcrumbsModel], facts: Facts
) -> Formula:
    """Base + lambda times the disjoint merge of the task vectors' middles."""
    return consensus(band_of(parameters, models, parameters.band_count).terms(facts), parameters, facts)


BREADCRUMBS_TIES = Method(
    name="breadcrumbs_ties",
    summary="Drops the largest and the smallest changes of each task vector, elects signs and merges what agrees.",
    paper="arXiv:2312.06795, arXiv:2306.01708",
    parameters=BreadcrumbsTiesParameters,
    model_parameters=BreadcrumbsModel,
    formula=formula,
    survey=survey,
    base="required",
    profiles={"paper": {"divisor": "count"}, "mergekit": {"band_count": "mergekit", "divisor": "weights"}},
    reads_as="the disjoint merge of `ties` of the task vectors that `breadcrumbs` leaves",
    example={"density": 0.5},
)
