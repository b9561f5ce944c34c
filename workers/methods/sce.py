"""SCE: select the elements that differ most, weigh models by their energy, erase minority signs (2408.07990)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from workers.kernels.base import Formula, Kernels, Operands
from workers.kernels.program import Program, Row, Writer
from workers.methods.base import BlockwisePass, Method, Parameters, Summary, SurveyPass
from workers.methods.common import Fraction01, NoParameters, terms_alone
from workers.methods.trim import BINS, add_histograms, pack_histogram, select_rank, zeros_of
from workers.task import Facts, JSONValue

SMALL = 1e-6
"""Where mergekit takes energies and divisors for zero."""


class SceParameters(Parameters):
    """Global parameters of ``sce``."""

    select_topk: Fraction01 = 1.0
    """The fraction of a tensor's elements that is kept, those of the largest variance among the task vectors, counted
    of the elements where the variance is not zero; equal variances stay together. 1 keeps all."""
    small_energies: Literal["weigh", "equal"] = "weigh"
    """Task vectors whose mean squares add up to less than 1e-6, as most fine-tunes' do: `weigh` models by them
    nevertheless; `equal`, let models weigh the same, and divide by 1e-6 at least."""
    int8_mask: bool = Field(default=False, exclude=True)
    """Accepted for mergekit's recipes and ignored: it has no numeric effect."""


@dataclass(frozen=True, slots=True)
class _Selected:
    """The task vectors where the variance among them is large enough."""

    writer: Writer
    variance: Row
    kept: tuple[Row, ...]

    @classmethod
    def of(cls, models: int, least: float | None) -> _Selected:
        """With the least variance that stays; ``None`` keeps all."""
        writer = Writer(models)
        mean = writer.total(writer.terms) / float(models)
        apart = [tau - mean for tau in writer.terms]
        variance = writer.total([each * each for each in apart]) / float(models)
        if least is None:
            return cls(writer, variance, writer.terms)
        small = variance < least  # not where it is NaN
        return cls(writer, variance, tuple(writer.choose(small, tau - tau, tau) for tau in writer.terms))


@dataclass(frozen=True, slots=True)
class Variances(SurveyPass):
    """The k-th largest variance, in two passes: its high 16 bits, then the low ones. Adds ``sce_high``, then
    ``sce_least``: its bits, or null where nothing is kept."""

    models: int
    """How many there are."""
    fraction: float
    """What is kept of the variances that are not zero."""
    is_second: bool
    """Which of the passes this is."""

    def needed(self, facts: Facts) -> bool:
        return not self.is_second or facts["sce_high"] is not None

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        selected = _Selected.of(self.models, None)
        program = selected.writer.program(selected.variance)
        counts = np.zeros((1, BINS), dtype=np.int64)
        high = [facts["sce_high"][0]] if self.is_second else None
        kernels.histogram(operands, Formula(terms_alone(self.models), True, program=program), high, counts)
        return pack_histogram(counts[0])

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return add_histograms(summaries)

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        if self.is_second:
            high, rank = facts["sce_high"]
            return {"sce_least": (high << 16) | select_rank(summary, rank)[0]}
        kept = int((numel - zeros_of(summary)) * self.fraction)
        return {"sce_high": select_rank(summary, kept)} if kept else {"sce_high": None, "sce_least": None}


@dataclass(frozen=True, slots=True)
class Energies(BlockwisePass):
    """The squares of what is kept, added up. Adds ``sce_weights``: per model its share of them."""

    models: int
    """How many there are."""
    parameters: SceParameters
    """How they become weights."""

    def needed(self, facts: Facts) -> bool:
        return _least(self.parameters, facts) is not None

    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        selected = _Selected.of(self.models, _least(self.parameters, facts))
        program = selected.writer.program(*selected.kept)
        formula = Formula(terms_alone(self.models), task_vectors=True, program=program)
        squares = [(model, model) for model in range(self.models)]
        sums: list[list[float]] = kernels.products(operands, formula, squares).tolist()
        return sums

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        energies = [math.fsum(column) / numel for column in zip(*summary.values(), strict=True)]
        total = math.fsum(energies)
        least = SMALL if self.parameters.small_energies == "equal" else 0.0
        if total <= least:
            return {"sce_weights": [1 / self.models] * self.models}
        return {"sce_weights": [energy / total for energy in energies]}


def _least(parameters: SceParameters, facts: Facts) -> float | None:
    """The least variance that stays; below zero when all do, ``None`` when nothing does."""
    if parameters.select_topk >= 1:
        return -1.0
    bits = facts["sce_least"]
    return None if bits is None else float(np.uint32(bits).view(np.float32))


def survey(parameters: SceParameters, models: Sequence[NoParameters]) -> tuple[SurveyPass, ...]:
    """The passes that find the variance's threshold, where there is one, and the weights."""
    count = len(models)
    chosen = [Variances(count, parameters.select_topk, is_second) for is_second in (False, True)]
    return (*(chosen if parameters.select_topk < 1 else ()), Energies(count, parameters))


def _merging(models: int, least: float, weights: Sequence[float], least_divisor: float) -> Program:
    selected = _Selected.of(models, least if least >= 0 else None)
    writer = selected.writer
    sign = writer.choose(writer.total(selected.kept) < 0.0, -1.0, 1.0)
    agree = [tau * sign > 0.0 for tau in selected.kept]
    total = writer.total(
        [
            writer.choose(agrees, tau * weight, tau - tau)
            for agrees, tau, weight in zip(agree, selected.kept, weights, strict=True)
        ]
    )
    divisor = writer.total([agrees * weight for agrees, weight in zip(agree, weights, strict=True)])
    if least_divisor:
        return writer.program(total / writer.choose(divisor < least_divisor, least_divisor, divisor))
    return writer.program(writer.choose(divisor, total / divisor, total))


def formula(parameters: SceParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The base, plus the weighted mean of what agrees with the majority's sign."""
    terms = terms_alone(len(models))
    least = _least(parameters, facts)
    if least is None:  # nothing is kept
        writer = Writer(len(models))
        total = writer.total(writer.terms)
        return Formula(terms, task_vectors=True, program=writer.program(total - total))
    least_divisor = SMALL if parameters.small_energies == "equal" else 0.0
    program = _merging(len(models), least, facts["sce_weights"], least_divisor)
    return Formula(terms, task_vectors=True, program=program)


SCE = Method(
    name="sce",
    summary="Selects the elements that differ most among task vectors, and averages them by energy where signs agree.",
    paper="arXiv:2408.07990",
    parameters=SceParameters,
    model_parameters=NoParameters,
    formula=formula,
    survey=survey,
    base="required",
    profiles={"paper": {"small_energies": "weigh"}, "mergekit": {"small_energies": "equal"}},
    reads_as="θ = θ_base + Σ wᵢ·τ̂ᵢ / Σ wᵢ over the models with sign(τ̂ᵢ) = sign(Σ τ̂) (+ at 0); τ̂ is τ where the "
    "variance among the τ is among the select_topk largest, else 0; wᵢ = Σ τ̂ᵢ² / Σⱼ Σ τ̂ⱼ²",
    example={"select_topk": 0.5},
)
