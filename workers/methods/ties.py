"""TIES: trim each task vector, elect a sign per element, merge the entries that agree (2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.base import Method, SurveyPass
from workers.methods.common import SparseModel, densities_of, terms_of
from workers.methods.elect import consensus
from workers.methods.majority import trim_and_election_passes
from workers.methods.trim import Trim, TrimmingParameters
from workers.task import Facts


class TiesParameters(TrimmingParameters):
    """Global parameters of ``ties``."""

    normalize: bool = True
    """Whether the sum of what agrees with the elected sign is divided, by what `divisor` says."""


def _trim(parameters: TiesParameters, models: Sequence[SparseModel]) -> Trim:
    terms = terms_of(models)
    return Trim(lambda facts: terms, densities_of(models), parameters.keep_count, parameters.equal_magnitudes)


def survey(parameters: TiesParameters, models: Sequence[SparseModel]) -> tuple[SurveyPass, ...]:
    """The passes for the thresholds, and for the majority sign where that is asked for."""
    return trim_and_election_passes(parameters, _trim(parameters, models))


def formula(parameters: TiesParameters, models: Sequence[SparseModel], facts: Facts) -> Formula:
    """Base + lambda times the disjoint merge of the trimmed task vectors."""
    return consensus(_trim(parameters, models).terms(facts), parameters, facts)


TIES = Method(
    name="ties",
    summary="Trims task vectors by magnitude, elects a sign per element and merges what agrees with it.",
    paper="arXiv:2306.01708",
    parameters=TiesParameters,
    model_parameters=SparseModel,
    formula=formula,
    survey=survey,
    base="required",
    profiles={
        "paper": {
            "trim_scope": "model",
            "keep_count": "paper",
            "equal_magnitudes": "keep",
            "zero_sign": "majority",
            "divisor": "count",
        },
        "mergekit": {
            "trim_scope": "tensor",
            "keep_count": "mergekit",
            "equal_magnitudes": "exact_k",
            "zero_sign": "positive",
            "divisor": "weights",
        },
    },
    reads_as="θ = θ_base + lambda · Σ wᵢ·τ̂ᵢ / Σ |wᵢ| over the models with sign(wᵢ·τ̂ᵢ) = sign(Σ w·τ̂); τ̂ "
    "is τ without but its largest magnitudes",
    example={"density": 0.5},
)
