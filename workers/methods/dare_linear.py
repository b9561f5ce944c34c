"""DARE, linear: drop and rescale task vectors at random, then add them up (2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.base import Method, SurveyPass
from workers.methods.common import (
    Rescale,
    SparseModel,
    TaskVectorParameters,
    densities_of,
    terms_of,
    weighted_sum,
)
from workers.methods.drop import Drop
from workers.task import Facts


class DareLinearParameters(TaskVectorParameters):
    """Global parameters of ``dare_linear``."""

    rescale: Rescale = "inverse"
    """What makes up for the dropped elements: `inverse`, 1/density; `l1`, what gives the task vector the L1 norm that
    it had before; `none` (or `false`), nothing."""


def _drop(parameters: DareLinearParameters, models: Sequence[SparseModel]) -> Drop:
    return Drop(terms_of(models), densities_of(models), parameters.rescale)


def survey(parameters: DareLinearParameters, models: Sequence[SparseModel]) -> tuple[SurveyPass, ...]:
    """The pass that measures norms, where they are to be matched."""
    return _drop(parameters, models).passes()


def formula(parameters: DareLinearParameters, models: Sequence[SparseModel], facts: Facts) -> Formula:
    """Base + lambda times the weighted sum of the sparse task vectors."""
    return weighted_sum(_drop(parameters, models).terms(facts), parameters)


DARE_LINEAR = Method(
    name="dare_linear",
    summary="Drops elements of task vectors at random, rescales the rest and adds them to the base model.",
    paper="arXiv:2311.03099",
    parameters=DareLinearParameters,
    model_parameters=SparseModel,
    formula=formula,
    survey=survey,
    base="required",
    profiles={"paper": {"rescale": "inverse"}, "mergekit": {"rescale": "l1"}},
    reads_as="θ = θ_base + lambda · Σ wᵢ·τ̂ᵢ (over Σ wᵢ with `normalize`); τ̂ keeps elements with the chance "
    "density, over it",
    example={"density": 0.5},
)
