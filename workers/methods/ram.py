"""RAM: average what several models changed, keep what only one did, and in RAM+ enlarge it (2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from workers.kernels.base import Formula, Kernels, Operands
from workers.kernels.program import Program, Row, Writer
from workers.methods.base import Method, Parameters, Summary, SurveyPass, SurveyScope
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters, Real, terms_alone
from workers.task import Facts


class RamParameters(Parameters):
    """Global parameters of ``ram``."""

    epsilon: Annotated[Real, Field(ge=0)] = 1e-5
    """Up to this magnitude a task vector's element counts as unchanged, and as zero."""


class RamPlusParameters(RamParameters):
    """Global parameters of ``ramplus_tl``."""

    r: Annotated[Real, Field(ge=0)] = 0.1
    """How much what only one model changed is enlarged, for each unit of that model's overlap."""
    alpha: Annotated[Real, Field(ge=0)] = 0.2
    """Most overlap that counts."""
    count_scope: SurveyScope = "tensor"
    """Where a model's overlap, the elements that others changed too over those that only it changed, is counted: in
    each `tensor`, or in the whole `model` as the paper does; merged tensors are then read twice."""

    @property
    def survey_scope(self) -> SurveyScope:
        return self.count_scope


@dataclass(frozen=True, slots=True)
class _Changed:
    """A program's rows, for each task vector: where it is changed, and there itself; and how many are."""

    writer: Writer
    active: tuple[Row, ...]
    kept: tuple[Row, ...]
    count: Row

    @classmethod
    def of(cls, models: int, epsilon: float) -> _Changed:
        writer = Writer(models)
        active = tuple(abs(tau) > epsilon for tau in writer.terms)
        # τ - τ is zero, and NaN where τ is: what is not a number is not lost.
        kept = tuple(
            writer.choose(changed, tau, tau - tau) for changed, tau in zip(active, writer.terms, strict=True)
        )
        return cls(writer, active, kept, writer.total(active))


def _merging(models: int, epsilon: float, factors: Sequence[float]) -> Program:
    rows = _Changed.of(models, epsilon)
    shared = rows.writer.total(rows.kept) / rows.count
    alone = rows.writer.total([row * factor for row, factor in zip(rows.kept, factors, strict=True)])
    return rows.writer.program(rows.writer.choose(rows.count > 1.0, shared, alone))


@dataclass(frozen=True, slots=True)
class Overlaps(SurveyPass):
    """How many elements of each model others changed too, and how many only it did. Adds ``ram_factor``: per model."""

    models: int
    """How many there are."""
    parameters: RamPlusParameters
    """How the factors follow."""

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        rows = _Changed.of(self.models, self.parameters.epsilon)
        shared = rows.count > 1.0
        both = [changed * shared for changed in rows.active]
        alone = [changed - too for changed, too in zip(rows.active, both, strict=True)]
        formula = Formula(
            terms_alone(self.models), task_vectors=True, program=rows.writer.program(*both, *alone)
        )
        sums = kernels.products(operands, formula, [(row, row) for row in range(2 * self.models)])
        return [int(count) for count in sums.sum(axis=0).tolist()]  # sums of whole numbers are exact

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return [sum(counts) for counts in zip(*summaries, strict=True)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        overlaps = (
            both / max(1, alone)
            for both, alone in zip(summary[: self.models], summary[self.models :], strict=True)
        )
        r, alpha = self.parameters.r, self.parameters.alpha
        return {"ram_factor": [1 + r * min(overlap, alpha) for overlap in overlaps]}


def formula(parameters: RamParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The base, plus the mean of what several changed, plus what only one did."""
    program = _merging(len(models), parameters.epsilon, [1.0] * len(models))
    return Formula(terms_alone(len(models)), task_vectors=True, program=program)


def plus_survey(parameters: RamPlusParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The pass that counts overlaps."""
    return (Overlaps(len(models), parameters),)


def plus_formula(parameters: RamPlusParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """As :func:`formula`, with what only one changed enlarged."""
    program = _merging(len(models), parameters.epsilon, facts["ram_factor"])
    return Formula(terms_alone(len(models)), task_vectors=True, program=program)


RAM = Method(
    name="ram",
    summary="Averages the elements that several models changed, and keeps those that only one did.",
    paper="arXiv:2601.13572",
    parameters=RamParameters,
    model_parameters=NoParameters,
    formula=formula,
    base="required",
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ_base + Σ τ̂ᵢ/n with τ̂ᵢ = τᵢ where |τᵢ| > epsilon, else 0, and n how many τ̂ are not 0 at that "
    "element",
)

RAMPLUS_TL = Method(
    name="ramplus_tl",
    summary="As ram, with what only one model changed enlarged by how much of that model others changed too.",
    paper="arXiv:2601.13572",
    parameters=RamPlusParameters,
    model_parameters=NoParameters,
    formula=plus_formula,
    survey=plus_survey,
    base="required",
    profiles={"paper": {"count_scope": "model"}, "mergekit": {"count_scope": "tensor"}},
    reads_as="as `ram`, with τ̂ᵢ · (1 + r·min(ρᵢ, alpha)) where only model i changed; ρᵢ is the number of its elements "
    "that others changed too, over the number that only it did",
)
