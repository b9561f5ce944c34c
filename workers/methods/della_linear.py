"""DELLA without its election: drop at random by magnitude, rescale, and add task vectors up (2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula
from workers.methods.base import Method, Whole
from workers.methods.common import Rescale, TaskVectorParameters, weighted_sum
from workers.methods.magprune import Chances, DellaModel, pruning, undrawn
from workers.task import Facts


class DellaLinearParameters(TaskVectorParameters):
    """Global parameters of ``della_linear``."""

    rescale: Rescale = "inverse"
    """What makes up for the dropped elements: `inverse`, 1 over each element's chance to stay; `l1`, what gives the
    task vector the L1 norm that it had before; `none` (or `false`), nothing."""
    chances: Chances = "half_width"
    """What `epsilon` is of the chances to stay: their `half_width`, from density - epsilon for a row's smallest element
    to density + epsilon for its largest; or as in the paper their `width`, and the smallest's is one rank's step more
    than density - epsilon/2."""


def whole(parameters: DellaLinearParameters, models: Sequence[DellaModel]) -> Whole | None:
    """The whole tensor at once, since ranks are of rows."""
    return pruning(parameters, parameters.rescale, parameters.chances, models)


def formula(parameters: DellaLinearParameters, models: Sequence[DellaModel], facts: Facts) -> Formula:
    """What is left to do where no model has elements to draw."""
    return weighted_sum(undrawn(models, facts), parameters)


DELLA_LINEAR = Method(
    name="della_linear",
    summary="Drops elements of task vectors at random, small ones rather than large, rescales and adds them.",
    paper="arXiv:2406.11617",
    parameters=DellaLinearParameters,
    model_parameters=DellaModel,
    formula=formula,
    whole=whole,
    base="required",
    profiles={
        "paper": {"rescale": "inverse", "chances": "width"},
        "mergekit": {"rescale": "l1", "chances": "half_width"},
    },
    reads_as="θ = θ_base + lambda · Σ wᵢ·τ̂ᵢ (over Σ wᵢ with `normalize`); τ̂ keeps an element with the chance p that "
    "its magnitude's rank in its row gives, between density − epsilon and density + epsilon, over p",
    example={"density": 0.5},
)
