"""TIES whose votes and means are weighed element by element by each model's Fisher.

No paper that we know of defines "Fisher-weighted TIES". What is described under that name multiplies task vectors by
a Fisher before signs are elected, and leaves the rest open. Here it is TIES (2306.01708) in which the weight of a
model's element is its ``weight`` times its Fisher, as in Fisher merging (2111.09832), wherever TIES has a weight: in
the election, and in the disjoint mean. The trim is TIES' own, by magnitude. So it is ``ties`` where all Fishers are
the same number, and ``fisher`` where nothing is trimmed and all signs agree.

Where only zeros would vote, models vote as if their Fishers were equal, which is what comes out as equal ever smaller
numbers are added to all; and so it is with the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from workers.kernels.base import Formula, Term
from workers.kernels.program import Program, Row, Writer
from workers.methods.base import Method, SurveyPass
from workers.methods.common import NO_PROFILE_DIFFERENCES, Real, SparseModel, densities_of, terms_alone
from workers.methods.importance import Floor, fisher_of, fisher_terms, shares_of
from workers.methods.trim import Trim, TrimParameters
from workers.task import Facts


class FisherTiesParameters(TrimParameters):
    """Global parameters of ``fisher_ties``."""

    lambda_: Real = Field(default=1.0, alias="lambda")
    """What the merged task vector is multiplied by before it is added to the base."""
    floor: Floor = 0.0
    """What a Fisher value counts as that is smaller, of every model: where all are 0, models weigh the same."""


def _trim(parameters: FisherTiesParameters, models: Sequence[SparseModel]) -> Trim:
    terms = terms_alone(len(models))
    return Trim(lambda facts: terms, densities_of(models), parameters.keep_count, parameters.equal_magnitudes)


def survey(parameters: FisherTiesParameters, models: Sequence[SparseModel]) -> tuple[SurveyPass, ...]:
    """The passes for the thresholds: they see the task vectors alone, and not the Fishers."""
    return _trim(parameters, models).passes()


def _program(models: Sequence[SparseModel], floor: float) -> Program:
    count = len(models)
    writer = Writer(2 * count)
    weighted = [tau * model.weight for tau, model in zip(writer.terms, models, strict=False)]
    shares, total = shares_of(writer, writer.terms[count:], floor)

    mass = writer.total([tau * share for tau, share in zip(weighted, shares, strict=True)])
    balance = writer.choose(abs(mass) > 0.0, mass, writer.total(weighted))
    is_negative = balance < 0.0
    # 1.0 or 0.0; a product with NaN is NaN, so that what is not a number is not lost.
    agree = [writer.choose(is_negative, tau < 0.0, tau > 0.0) for tau in weighted]
    agreeing = [tau * yes for tau, yes in zip(weighted, agree, strict=True)]

    def mean(weights: Sequence[Row | None]) -> tuple[Row, Row]:
        """The agreeing task vectors' mean under these weights, 1 for each where there is none; and what divides it."""
        above, below = [], []
        for tau, yes, weight, model in zip(agreeing, agree, weights, models, strict=True):
            above.append(tau if weight is None else tau * weight)
            share = yes * abs(model.weight)
            below.append(share if weight is None else share * weight)
        divisor = writer.total(below)
        return writer.total(above) / writer.choose(divisor > 0.0, divisor, 1.0), divisor

    weighed, divisor = mean(shares)
    plain, _ = mean([None] * count)
    return writer.program(writer.choose(divisor > 0.0, weighed, plain) + (total - total))


def formula(parameters: FisherTiesParameters, models: Sequence[SparseModel], facts: Facts) -> Formula:
    """Base + lambda times the disjoint mean of the trimmed task vectors, weighed by weight times Fisher."""
    terms: tuple[Term, ...] = (*_trim(parameters, models).terms(facts), *fisher_terms(len(models)))
    program = _program(models, parameters.floor)
    return Formula(terms, task_vectors=True, lambda_=parameters.lambda_, program=program)


FISHER_TIES = Method(
    name="fisher_ties",
    summary="Trims task vectors, elects a sign per element and merges what agrees, all weighed by Fisher information.",
    paper="arXiv:2306.01708, weighed as in arXiv:2111.09832 (see below)",
    parameters=FisherTiesParameters,
    model_parameters=SparseModel,
    formula=formula,
    survey=survey,
    base="required",
    statistic=fisher_of(without=None),
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + lambda · Σ wᵢ·Fᵢ·τ̂ᵢ / Σ |wᵢ|·Fᵢ over the models with sign(wᵢ·τ̂ᵢ) = sign(Σ w·F·τ̂); τ̂ is τ "
    "without but its largest magnitudes, Fᵢ each model's `fisher`, at least `floor`; 1 for all where only zeros count",
    example={"density": 0.5},
)
