"""Parameter types that several methods share, and the terms and weighted sums that most of them are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticUseDefault

from workers.kernels.base import Formula, Term
from workers.kernels.scalars import weight_sum
from workers.methods.base import Parameters
from workers.task import JSONValue

FLOAT32_MAX = 3.4028234663852886e38


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _float32(value: float) -> float:
    if abs(value) > FLOAT32_MAX:
        raise ValueError(f"{value} is beyond float32's range")
    return value


def _rescale(value: Any) -> Any:
    # mergekit spells this switch as a boolean.
    if value is True:
        raise PydanticUseDefault
    return "none" if value is False else value


Real = Annotated[float, BeforeValidator(_number), AfterValidator(_float32)]
"""A finite number within float32's range; booleans are refused."""

Fraction01 = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
"""A number from 0 to 1; booleans are refused."""

EqualMagnitudes = Literal["keep", "exact_k"]
ZeroSign = Literal["positive", "majority"]
Rescale = Annotated[Literal["inverse", "l1", "none"], BeforeValidator(_rescale)]
"""How DARE makes up for what it drops; ``true`` is the default and ``false`` is ``none``."""

ADDING_METHODS = ("linear", "task_arithmetic")
"""Methods whose results are the base and a sum of what each model adds to it."""

NO_PROFILE_DIFFERENCES: Mapping[str, Mapping[str, JSONValue]] = MappingProxyType(
    {"paper": {}, "mergekit": {}}
)
"""Profiles of a method on which the paper, mergekit and Mergemill agree."""


class NoParameters(Parameters):
    """A method, or its models, without parameters."""


class WeightedModel(Parameters):
    """Parameters of a model that is only weighted."""

    weight: Real = 1.0
    """What the model, or its task vector, is multiplied by; may be negative."""


class SparseModel(WeightedModel):
    """Parameters of a model whose task vector is sparsified first."""

    density: Fraction01 = 1.0
    """The fraction of the task vector's elements that is kept: the largest where it is trimmed (`ties`), random ones
    where it is dropped (DARE)."""


class TaskVectorParameters(Parameters):
    """Global parameters of every method that adds task vectors to a base."""

    normalize: bool = False
    """Whether to divide the weighted sum by the sum of the weights; one that vanishes divides by 1."""
    lambda_: Real = Field(default=1.0, alias="lambda")
    """What the merged task vector is multiplied by before it is added to the base."""
    int8_mask: bool = Field(default=False, exclude=True)
    """Accepted for mergekit's recipes and ignored: it has no numeric effect."""


def terms_of(models: Sequence[WeightedModel]) -> tuple[Term, ...]:
    """A term for each model: the whole of it, times its weight."""
    return tuple(Term(index, model.weight) for index, model in enumerate(models))


def terms_alone(models: int) -> tuple[Term, ...]:
    """A term for each model: the whole of it."""
    return tuple(Term(model) for model in range(models))


def densities_of(models: Sequence[SparseModel]) -> tuple[float, ...]:
    """The models' densities."""
    return tuple(model.density for model in models)


def normalizer(terms: Sequence[Term], normalize: bool) -> float | None:
    """What a weighted sum is divided by: the sum of the weights (1 where that vanishes), or nothing."""
    return weight_sum([term.weight for term in terms]) if normalize else None


def weighted_sum(terms: tuple[Term, ...], parameters: TaskVectorParameters) -> Formula:
    """The base plus lambda times the weighted sum of task vectors."""
    return Formula(
        terms,
        task_vectors=True,
        divide=normalizer(terms, parameters.normalize),
        lambda_=parameters.lambda_,
    )
