"""Fisher merging: the mean of the models, each element weighed by what it matters to its model (2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Formula
from workers.kernels.program import Writer
from workers.kernels.scalars import weight_sum
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, Real, terms_alone
from workers.methods.importance import Floor, fisher_of, fisher_terms, shares_of
from workers.task import Facts


class FisherParameters(Parameters):
    """Global parameters of ``fisher``."""

    floor: Floor = 0.0
    """What a Fisher value counts as that is smaller, of every model: an element whose sum is 0 is averaged."""


class FisherModel(Parameters):
    """Parameters of each model."""

    weight: Annotated[Real, Field(ge=0)] = 1.0
    """What the model's Fisher, or Gram matrix, is multiplied by; 1 over the number of examples where it is a sum over
    them and not a mean."""


def formula(parameters: FisherParameters, models: Sequence[FisherModel], facts: Facts) -> Formula:
    """The mean weighed by weight times Fisher, and by weight alone where all of these products are zero."""
    count = len(models)
    writer = Writer(2 * count)
    thetas, fishers = writer.terms[:count], writer.terms[count:]
    shares, total = shares_of(writer, fishers, parameters.floor)
    weighted = [share * model.weight for share, model in zip(shares, models, strict=True)]
    below = writer.total(weighted)
    divisor = writer.choose(below > 0.0, below, 1.0)
    mean = writer.total([theta * (each / divisor) for theta, each in zip(thetas, weighted, strict=True)])
    whole = weight_sum([model.weight for model in models])
    plain = writer.total([theta * model.weight for theta, model in zip(thetas, models, strict=True)]) / whole
    # total - total is zero, and NaN where a Fisher is: what is not a number is not lost.
    program = writer.program(writer.choose(below > 0.0, mean, plain + (total - total)))
    return Formula((*terms_alone(count), *fisher_terms(count)), program=program)


FISHER = Method(
    name="fisher",
    summary="Averages the models, each element weighed by its Fisher information.",
    paper="arXiv:2111.09832",
    parameters=FisherParameters,
    model_parameters=FisherModel,
    formula=formula,
    statistic=fisher_of(without="linear"),
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = Σ wᵢ·Fᵢ·θᵢ / Σ wᵢ·Fᵢ with Fᵢ each model's `fisher`, at least `floor`; Σ wᵢ·θᵢ / Σ wᵢ where all "
    "wᵢ·Fᵢ are 0",
)
