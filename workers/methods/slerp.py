"""SLERP: spherical interpolation between two models, each tensor taken as one vector (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workers.kernels.base import PAIR, PAIRS, Formula, Kernels, Operands, Term
from workers.kernels.scalars import slerp_coefficients
from workers.methods.base import BlockwisePass, Method, Parameters, Summary, SurveyPass
from workers.methods.common import NO_PROFILE_DIFFERENCES, Fraction01, NoParameters
from workers.task import Facts, JSONValue


class SlerpParameters(Parameters):
    """Global parameters of ``slerp``."""

    t: Fraction01
    """How far to go from the first model (0) to the second (1); at either end its elements exactly."""


@dataclass(frozen=True, slots=True)
class Angle(BlockwisePass):
    """Both squared norms and the dot product. Adds ``slerp``: the two models' coefficients."""

    t: float
    """How far to go."""

    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        sums: list[list[float]] = kernels.products(operands, PAIR, PAIRS).tolist()
        return sums

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        first, second, dot = (math.fsum(sums) for sums in zip(*summary.values(), strict=True))
        return {"slerp": list(slerp_coefficients(self.t, first, second, dot))}


def survey(parameters: SlerpParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The pass that measures the angle; none at either end."""
    return (Angle(parameters.t),) if 0 < parameters.t < 1 else ()


def formula(parameters: SlerpParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The first model turned towards the second; linear where they are nearly parallel or one is zero."""
    if parameters.t in (0, 1):
        return Formula((Term(int(parameters.t)),))
    return Formula(tuple(Term(model, coefficient) for model, coefficient in enumerate(facts["slerp"])))


SLERP = Method(
    name="slerp",
    summary="Interpolates between two models along a great circle.",
    paper="Shoemake 1985, doi:10.1145/325165.325242",
    parameters=SlerpParameters,
    model_parameters=NoParameters,
    formula=formula,
    survey=survey,
    base="first_model",
    min_models=2,
    max_models=2,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = sin((1−t)·Ω)/sin Ω · θ₁ + sin(t·Ω)/sin Ω · θ₂ with Ω the angle between them; linear where "
    "that is small",
    example={"t": 0.5},
)
