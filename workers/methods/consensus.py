"""Consensus merging by TALL masks: keep what is of use to several models (2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Formula
from workers.kernels.program import Program, Writer
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, Real, WeightedModel, terms_alone
from workers.task import Facts


class ConsensusModel(WeightedModel):
    """Parameters of each model."""

    mask_lambda: Annotated[Real, Field(ge=0)] = 0.4
    """How strict the model's TALL mask is, from the paper's 0.2 to 0.6: an element is of use to a model where its own
    change is at least so many times as large as what the other models add to it."""


class ConsensusParameters(Parameters):
    """Global parameters of ``consensus``."""

    agreement: Annotated[int, Field(ge=0, le=64)] = 2
    """To how many models an element has to be of use to stay: 2 is the paper's; 1 only drops what no model uses, 0
    nothing."""
    lambda_: Real = Field(default=1.0, alias="lambda")
    """What the merged task vector is multiplied by before it is added to the base."""


def _program(models: Sequence[ConsensusModel], agreement: int) -> Program:
    writer = Writer(len(models))
    weighted = [tau * model.weight for tau, model in zip(writer.terms, models, strict=True)]
    total = writer.total(weighted)
    useless = [
        abs(tau) < abs(total - tau) * model.mask_lambda
        for tau, model in zip(writer.terms, models, strict=True)
    ]
    enough = float(max(0, len(models) - agreement))
    # total - total is zero, and NaN where total is: what is not a number is not lost.
    return writer.program(writer.choose(writer.total(useless) > enough, total - total, total))


def formula(parameters: ConsensusParameters, models: Sequence[ConsensusModel], facts: Facts) -> Formula:
    """Base + lambda times what of the summed task vectors enough models have a use for."""
    program = _program(models, parameters.agreement)
    return Formula(terms_alone(len(models)), task_vectors=True, lambda_=parameters.lambda_, program=program)


CONSENSUS = Method(
    name="consensus",
    summary="Adds up task vectors where enough models' TALL masks agree that the sum is of use to them.",
    paper="arXiv:2405.07813",
    parameters=ConsensusParameters,
    model_parameters=ConsensusModel,
    formula=formula,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + lambda · τ where at least `agreement` of the masks |τᵢ| ≥ mask_lambdaᵢ·|τ − τᵢ| hold, else "
    "θ_base; τ = Σ wᵢ·τᵢ",
)
