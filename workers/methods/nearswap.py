"""NearSwap: take the other model's elements where they are near the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Formula
from workers.kernels.program import Program, Writer
from workers.methods.base import Method, Parameters
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters, Real, terms_alone
from workers.task import Facts


class NearswapParameters(Parameters):
    """Global parameters of ``nearswap``."""

    t: Annotated[Real, Field(ge=0)]
    """The distance up to which an element is the other model's; beyond it, the base's moved by as much."""


def _program(t: float) -> Program:
    writer = Writer(1)
    (tau,) = writer.terms
    share = t / abs(tau)
    return writer.program(tau * writer.choose(share < 1.0, share, 1.0))


def formula(parameters: NearswapParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The base, moved towards the other model by ``t`` at most."""
    return Formula(terms_alone(1), task_vectors=True, program=_program(parameters.t))


NEARSWAP = Method(
    name="nearswap",
    summary="Moves each element of the base towards the other model's, by t at most.",
    paper="mergekit's documentation; huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=NearswapParameters,
    model_parameters=NoParameters,
    formula=formula,
    base="required",
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + min(1, t/|τ|) · τ",
    example={"t": 0.1},
)
