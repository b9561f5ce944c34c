"""DARE, then TIES: drop and rescale at random, elect signs, merge what agrees (2311.03099, 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from workers.kernels.base import Formula
from workers.methods.base import Method, SurveyPass, SurveyScope
from workers.methods.common import Fraction01, Rescale, SparseModel, densities_of, terms_of
from workers.methods.drop import Drop
from workers.methods.elect import consensus
from workers.methods.majority import trim_and_election_passes
from workers.methods.trim import Trim, TrimmingParameters
from workers.task import Facts


class DareTiesParameters(TrimmingParameters):
    """Global parameters of ``dare_ties``; those of the trim only have a meaning with ``retrim``."""

    rescale: Rescale = "inverse"
    """What makes up for the dropped elements: `inverse`, 1/density; `l1`, what gives the task vector the L1 norm that
    it had before; `none` (or `false`), nothing."""
    retrim: bool = False
    """Whether TIES trims the dropped and rescaled task vectors again, as the authors do; the trim's own switches
    (`trim_scope`, `keep_count`, `equal_magnitudes`) have a meaning only then."""
    trim_density: Fraction01 = 0.2
    """The fraction of each task vector that `retrim` keeps, dropped elements counted."""

    @property
    def survey_scope(self) -> SurveyScope:
        return self.trim_scope if self.retrim else "tensor"

    @model_validator(mode="after")
    def _norms_within_tensors(self) -> Self:
        if self.survey_scope == "model" and self.rescale == "l1":
            raise ValueError(
                "rescale 'l1' needs trim_scope 'tensor': norms are only matched within a tensor; use inverse"
            )
        return self


def _steps(parameters: DareTiesParameters, models: Sequence[SparseModel]) -> tuple[Drop, Trim]:
    drop = Drop(terms_of(models), densities_of(models), parameters.rescale)
    densities = (parameters.trim_density if parameters.retrim else 1.0,) * len(models)
    return drop, Trim(drop.terms, densities, parameters.keep_count, parameters.equal_magnitudes)


def survey(parameters: DareTiesParameters, models: Sequence[SparseModel]) -> tuple[SurveyPass, ...]:
    """The passes for norms, thresholds and the majority sign, each only where it is asked for."""
    drop, trim = _steps(parameters, models)
    return drop.passes() + trim_and_election_passes(parameters, trim)


def formula(parameters: DareTiesParameters, models: Sequence[SparseModel], facts: Facts) -> Formula:
    """Base + lambda times the disjoint merge of the sparse task vectors."""
    _, trim = _steps(parameters, models)
    return consensus(trim.terms(facts), parameters, facts)


DARE_TIES = Method(
    name="dare_ties",
    summary="Drops elements of task vectors at random, rescales the rest, then elects signs and merges.",
    paper="arXiv:2311.03099",
    parameters=DareTiesParameters,
    model_parameters=SparseModel,
    formula=formula,
    survey=survey,
    base="required",
    profiles={
        "paper": {
            "rescale": "inverse",
            "retrim": True,
            "trim_scope": "model",
            "keep_count": "paper",
            "equal_magnitudes": "keep",
            "zero_sign": "majority",
            "divisor": "count",
            "normalize": True,
        },
        "mergekit": {"rescale": "l1", "retrim": False, "zero_sign": "positive", "divisor": "weights"},
    },
    reads_as="the disjoint merge of `ties` of the task vectors that `dare_linear` leaves",
    example={"density": 0.5},
)
