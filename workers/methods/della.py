"""DELLA: drop at random by magnitude, rescale, elect signs and merge what agrees (2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from workers.kernels.base import Formula
from workers.methods.base import Method, Whole
from workers.methods.common import Rescale
from workers.methods.elect import ElectingParameters, consensus
from workers.methods.magprune import Chances, DellaModel, pruning, undrawn
from workers.task import Facts


class DellaParameters(ElectingParameters):
    """Global parameters of ``della``."""

    normalize: bool = True
    """Whether the sum of what agrees with the elected sign is divided, by what `divisor` says."""
    zero_sign: Literal["positive"] = "positive"
    """The sign elected where the weighted sum is exactly zero: `positive`."""
    rescale: Rescale = "inverse"
    """What makes up for the dropped elements: `inverse`, 1 over each element's chance to stay; `l1`, what gives the
    task vector the L1 norm that it had before; `none` (or `false`), nothing."""
    chances: Chances = "half_width"
    """What `epsilon` is of the chances to stay: their `half_width`, from density - epsilon for a row's smallest element
    to density + epsilon for its largest; or as in the paper their `width`, and the smallest's is one rank's step more
    than density - epsilon/2."""


def whole(parameters: DellaParameters, models: Sequence[DellaModel]) -> Whole | None:
    """The whole tensor at once, since ranks are of rows."""
    return pruning(parameters, parameters.rescale, parameters.chances, models)


def formula(parameters: DellaParameters, models: Sequence[DellaModel], facts: Facts) -> Formula:
    """What is left to do where no model has elements to draw."""
    return consensus(undrawn(models, facts), parameters, facts)


DELLA = Method(
    name="della",
    summary="Drops elements at random, small ones rather than large, elects signs and merges what agrees.",
    paper="arXiv:2406.11617",
    parameters=DellaParameters,
    model_parameters=DellaModel,
    formula=formula,
    whole=whole,
    base="required",
    profiles={
        "paper": {"rescale": "inverse", "chances": "width", "divisor": "count"},
        "mergekit": {"rescale": "l1", "chances": "half_width", "divisor": "weights"},
    },
    reads_as="the disjoint merge of `ties` of the task vectors that `della_linear` leaves",
    example={"density": 0.5},
)
