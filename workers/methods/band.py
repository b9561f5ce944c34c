"""The middle of each task vector: the thresholds between which its magnitudes stay, exact and out of core.

As :mod:`workers.methods.trim`, which finds one threshold, by two passes of histograms: here each task vector has up to
two ranks, that of the largest magnitude that stays and that of the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from workers.kernels.base import DROP_NUMBERS, Formula, Kernels, Operands, Term
from workers.methods.base import Summary, SurveyPass
from workers.methods.trim import BINS, add_histograms, pack_histogram, select_rank
from workers.task import Facts

BandCount = Literal["exact", "mergekit"]


@dataclass(frozen=True, slots=True)
class Band:
    """Which magnitudes of the models' task vectors stay."""

    source: tuple[Term, ...]
    """What is cut: a term for each model."""
    densities: tuple[float, ...]
    """The fraction of each that stays."""
    gammas: tuple[float, ...]
    """The fraction of each, of the largest magnitudes, that goes."""
    count: BandCount
    """How fractions become numbers of elements."""

    @property
    def cut(self) -> tuple[int, ...]:
        """The models that neither keep all nor nothing."""
        return tuple(model for model, density in enumerate(self.densities) if 0 < density < 1)

    def passes(self) -> tuple[SurveyPass, ...]:
        """The passes that find the thresholds; none when no model has one."""
        return (BandHigh(self), BandLow(self)) if self.cut else ()

    def ranks(self, model: int, numel: int) -> tuple[int, int]:
        """From the largest magnitude down, from 1, the first that stays and the last; last < first when none does."""
        return band_ranks(self.densities[model], self.gammas[model], numel, self.count)

    def terms(self, facts: Facts) -> tuple[Term, ...]:
        """The terms, cut."""
        return tuple(self._cut(term, facts) for term in self.source)

    def _cut(self, term: Term, facts: Facts) -> Term:
        if self.densities[term.model] >= 1:
            return term
        bounds = facts["band"][term.model] if self.densities[term.model] > 0 else None
        if bounds is None:
            return replace(term, threshold=DROP_NUMBERS)
        return replace(term, threshold=bounds[0], ceiling=bounds[1] + 1)

    def surveyed(self) -> Formula:
        """The terms that are cut, each twice: once for each rank."""
        return Formula(tuple(self.source[model] for model in self.cut for _ in range(2)), task_vectors=True)


def band_ranks(density: float, gamma: float, numel: int, count: BandCount) -> tuple[int, int]:
    """Of ``numel`` magnitudes, largest first, which stay at ``density`` once the fraction ``gamma`` is gone.

    So many stay as the density says, whatever gamma: where they do not fit below what goes, less goes. ``exact`` takes
    the numbers as they are written and keeps at least 1; ``mergekit`` is int(density * numel) in floats, maybe 0.
    """
    if count == "exact":
        top = Fraction(str(gamma)) * numel // 1
        keep = max(1, Fraction(str(density)) * numel // 1)
    else:
        top, keep = int(gamma * numel), int(density * numel)
    top = min(top, numel - keep)
    return int(top) + 1, int(top + keep)


@dataclass(frozen=True)
class BandHigh(SurveyPass):
    """Pass 1: the high 16 bits. Adds ``band_high``: per cut model and rank, the bin and the rank within it."""

    band: Band
    """What is cut, and how."""

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        terms = self.band.surveyed().terms[::2]  # both ranks are of one histogram
        counts = np.zeros((len(terms), BINS), dtype=np.int64)
        kernels.histogram(operands, Formula(terms, task_vectors=True), None, counts)
        return [pack_histogram(counted) for counted in counts]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return [add_histograms(histograms) for histograms in zip(*summaries, strict=True)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        found = []
        for model, histogram in zip(self.band.cut, summary, strict=True):
            first, last = self.band.ranks(model, numel)
            kept = last >= first
            found.append([select_rank(histogram, rank) for rank in (first, last)] if kept else None)
        return {"band_high": found}


@dataclass(frozen=True)
class BandLow(SurveyPass):
    """Pass 2: the low 16 bits within those bins. Adds ``band``: per model the smallest and largest bits that stay."""

    band: Band
    """What is cut, and how."""

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        formula = self.band.surveyed()
        high = [rank[0] for ranks in facts["band_high"] for rank in ranks or ([0], [0])]
        counts = np.zeros((len(formula.terms), BINS), dtype=np.int64)
        kernels.histogram(operands, formula, high, counts)
        return [pack_histogram(counted) for counted in counts]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return [add_histograms(histograms) for histograms in zip(*summaries, strict=True)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        found: list[list[int] | None] = [None] * len(self.band.densities)
        for place, (model, ranks) in enumerate(zip(self.band.cut, facts["band_high"], strict=True)):
            if ranks is None:
                continue
            largest, smallest = (
                (high << 16) | select_rank(summary[2 * place + side], rank)[0]
                for side, (high, rank) in enumerate(ranks)
            )
            found[model] = [smallest, largest]
        return {"band": found}
