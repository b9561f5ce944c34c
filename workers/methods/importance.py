"""A diagonal Fisher for each model: what its methods share.

The Fisher's diagonal is the mean, over a model's data, of the squared gradient of the log-likelihood. It comes as a
checkpoint with the names, and the shapes, of the model's tensors. How one is scaled beside the others is for users to
say, by ``weight``. No square is negative: what is below ``floor``, 0 unless it is set, counts as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Term
from workers.kernels.program import Row, Writer
from workers.methods.base import Statistic
from workers.methods.common import Real

Floor = Annotated[Real, Field(ge=0)]
"""A bound from below: a number of at least 0."""


def fisher_of(without: str | None) -> Statistic:
    """The Fisher that a method needs of every tensor, but for those that it leaves to the method ``without``."""
    return Statistic("fisher", lambda parameters, shape: shape, without)


def fisher_terms(models: int) -> tuple[Term, ...]:
    """A term for the Fisher of each model."""
    return tuple(Term(model, statistic=True) for model in range(models))


def shares_of(writer: Writer, fishers: Sequence[Row], floor: float) -> tuple[list[Row], Row]:
    """Of each element the models' shares of their Fishers' sum, zeros where that is zero; and the sum.

    Shares, and not the Fishers themselves, are multiplied by parameters: mean squares of gradients are often so small
    that float32 would lose the product.
    """
    bounded = [writer.choose(fisher < floor, floor, fisher) for fisher in fishers]
    total = writer.total(bounded)
    divisor = writer.choose(total > 0.0, total, 1.0)
    return [each / divisor for each in bounded], total
