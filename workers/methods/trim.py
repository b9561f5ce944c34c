"""TIES' first step, exact and out of core: the k-th largest magnitude of each task vector by radix histogram.

The magnitude bits of a float32 are ordered as the magnitudes are. A first pass counts their high 16 bits, a
second the low 16 bits within the one bin that holds the k-th largest; together they are the threshold, bit
for bit. Only when exactly k elements shall be kept does a third pass count the equal ones per block.
"""

from __future__ import annotations

import base64
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import numpy as np
from pydantic import model_validator

from workers.kernels.base import DROP_NUMBERS, Counts, Formula, Kernels, Operands, Term
from workers.kernels.scalars import KeepCount, keep_count
from workers.methods.base import BlockwisePass, Parameters, Summary, SurveyPass, SurveyScope, Terms
from workers.methods.common import EqualMagnitudes
from workers.methods.elect import ElectingParameters
from workers.task import Facts, JSONValue

BINS = 1 << 16
"""Values of 16 bits."""


class TrimParameters(Parameters):
    """Global parameters of a trim."""

    trim_scope: SurveyScope = "tensor"
    """What a density, and a majority of signs, is taken of: each `tensor`, or the whole `model` as one vector, with one
    threshold and tied duplicates counted once; merged tensors are then read up to four times."""
    keep_count: KeepCount = "exact"
    """How many of n elements a density keeps: `exact`, floor(density·n) of the number as it is written, at least 1;
    `paper`, int(density·n) + 1 in floats; `mergekit`, max(1, int(density·n)) in floats."""
    equal_magnitudes: EqualMagnitudes = "keep"
    """Of elements as large as the smallest that stays: `keep` all, or `exact_k`, those of the lowest index, so that no
    more stay than `keep_count` says."""

    @property
    def survey_scope(self) -> SurveyScope:
        return self.trim_scope

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.survey_scope == "model" and self.equal_magnitudes == "exact_k":
            raise ValueError(
                "equal_magnitudes 'exact_k' needs trim_scope 'tensor': "
                "the order of equal elements is only defined within a tensor; use keep"
            )
        return self


class TrimmingParameters(TrimParameters, ElectingParameters):
    """Global parameters of the methods that trim and elect."""


@dataclass(frozen=True, slots=True)
class Trim:
    """How the models' task vectors are trimmed."""

    source: Terms
    """What is trimmed."""
    densities: tuple[float, ...]
    """The fraction of each that is kept."""
    keep_count: KeepCount
    """How that fraction becomes a number of elements."""
    equal_magnitudes: EqualMagnitudes
    """Whether all elements equal to the k-th stay, or the first of them up to k."""

    @property
    def thresholded(self) -> tuple[bool, ...]:
        """Which models have a threshold: those that neither keep all nor nothing."""
        return tuple(
            density < 1 and keep_count(density, 1, self.keep_count) > 0 for density in self.densities
        )

    def passes(self) -> tuple[SurveyPass, ...]:
        """The passes that find the thresholds; none when no model has one."""
        if not any(self.thresholded):
            return ()
        passes = (HighHistogram(self), LowHistogram(self))
        return (*passes, Equals(self)) if self.equal_magnitudes == "exact_k" else passes

    def terms(self, facts: Facts) -> tuple[Term, ...]:
        """The trimmed terms."""
        return tuple(self._trimmed(term, facts) for term in self.source(facts))

    def _trimmed(self, term: Term, facts: Facts) -> Term:
        if self.densities[term.model] >= 1:
            return term
        if not self.thresholded[term.model]:
            return replace(term, threshold=DROP_NUMBERS)
        cut = None
        if self.equal_magnitudes == "exact_k":
            block, take = facts["trim_cut"][term.model]
            cut = block, take
        return replace(term, threshold=facts["trim_threshold"][term.model], cut=cut)

    def surveyed(self, facts: Facts) -> Formula:
        """The untrimmed terms of the models that have a threshold."""
        terms = (term for term in self.source(facts) if self.thresholded[term.model])
        return Formula(tuple(terms), task_vectors=True)


@dataclass(frozen=True)
class _Histogram(SurveyPass):
    """Counts per bin of 16 bits; a summary has one packed histogram a model, null for one without a threshold.

    While a run is counted, a model costs one array of 65,536 counts, whatever the run's length.
    """

    trim: Trim
    """What is trimmed, and how."""

    @abstractmethod
    def _high(self, formula: Formula, facts: Facts) -> list[int] | None:
        """The high 16 bits of the elements whose low bits are counted; ``None`` to count the high ones."""

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        formula = self.trim.surveyed(facts)
        counts = np.zeros((len(formula.terms), BINS), dtype=np.int64)
        kernels.histogram(operands, formula, self._high(formula, facts), counts)
        packed = {
            term.model: pack_histogram(counted) for term, counted in zip(formula.terms, counts, strict=True)
        }
        return [packed.get(model) for model in range(len(self.trim.densities))]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        if len(summaries) == 1:
            return summaries[0]
        return [add_histograms(histograms) for histograms in zip(*summaries, strict=True)]


class HighHistogram(_Histogram):
    """Pass 1: the high 16 bits. Adds ``trim_high``: per model the bin, and the k-th's rank within it."""

    def _high(self, formula: Formula, facts: Facts) -> None:
        return None

    def at_once(self, kernels: Kernels, operands: Operands, facts: Facts) -> Facts:
        """The thresholds themselves: with the whole tensor at hand a pass or two by a guess find them."""
        formula = self.trim.surveyed(facts)
        models = [term.model for term in formula.terms]
        ranks = [
            keep_count(self.trim.densities[model], operands.numel, self.trim.keep_count) for model in models
        ]
        found = dict(zip(models, kernels.largest(operands, formula, ranks), strict=True))
        every = [found.get(model, (None, None)) for model in range(len(self.trim.densities))]
        return {
            "trim_threshold": [threshold for threshold, _ in every],
            "trim_equals": [equals for _, equals in every],
        }

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        ranks = (keep_count(density, numel, self.trim.keep_count) for density in self.trim.densities)
        return {
            "trim_high": [
                None if histogram is None else select_rank(histogram, rank)
                for histogram, rank in zip(summary, ranks, strict=True)
            ]
        }


class LowHistogram(_Histogram):
    """Pass 2: the low 16 bits within that bin.

    Adds ``trim_threshold``: the k-th magnitude's bits; ``trim_equals``: how many equal to it make up k.
    """

    def needed(self, facts: Facts) -> bool:
        return "trim_threshold" not in facts

    def _high(self, formula: Formula, facts: Facts) -> list[int]:
        return [facts["trim_high"][term.model][0] for term in formula.terms]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        thresholds: list[int | None] = []
        equals: list[int | None] = []
        for histogram, high in zip(summary, facts["trim_high"], strict=True):
            low, rank = (None, None) if histogram is None else select_rank(histogram, high[1])
            thresholds.append(None if low is None else (high[0] << 16) | low)
            equals.append(rank)
        return {"trim_threshold": thresholds, "trim_equals": equals}


@dataclass(frozen=True)
class Equals(BlockwisePass):
    """Pass 3, for exactly k: the elements equal to the threshold.

    Adds ``trim_cut``: per model the block where the k-th lies, and how many equal ones that block keeps. A
    block has the count of each model, 0 for one without a threshold.
    """

    trim: Trim
    """What is trimmed, and how."""

    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        formula = self.trim.surveyed(facts)
        models = [term.model for term in formula.terms]
        found = kernels.equal_counts(operands, formula, [facts["trim_threshold"][model] for model in models])
        counts = np.zeros((len(found), len(self.trim.densities)), dtype=np.int64)
        counts[:, models] = found
        return counts.tolist()

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        numbers = sorted(map(int, summary))
        cuts: list[list[int] | None] = []
        for model, wanted in enumerate(facts["trim_equals"]):
            if wanted is None:
                cuts.append(None)
                continue
            counts = [summary[str(number)][model] for number in numbers]
            totals = list(accumulate(counts))
            at = next(index for index, total in enumerate(totals) if total >= wanted)
            cuts.append([numbers[at], wanted - totals[at] + counts[at]])
        return {"trim_cut": cuts}


def pack_histogram(counts: Counts) -> str:
    """A histogram as text: base64 of zlib of the gaps between filled bins (uint16) and their counts (int64)."""
    (bins,) = np.nonzero(counts > 0)  # of booleans it is several times as fast
    gaps = bins.astype("<u2")
    gaps[1:] -= gaps[:-1].copy()
    raw = gaps.tobytes() + counts[bins].astype("<i8").tobytes()
    return base64.b64encode(zlib.compress(raw, level=1)).decode("ascii")


def counts_of(histogram: str) -> tuple[Counts, Counts]:
    """The filled bins of a packed histogram, ascending, and their counts."""
    raw = zlib.decompress(base64.b64decode(histogram))
    filled = len(raw) // 10
    gaps = np.frombuffer(raw, "<u2", filled)
    return np.cumsum(gaps, dtype=np.int64), np.frombuffer(raw, "<i8", filled, offset=2 * filled)


def zeros_of(histogram: str) -> int:
    """How many values were in the first bin of a packed histogram: of high bits, zeros (and magnitudes below 1e-40)."""
    bins, counts = counts_of(histogram)
    return int(counts[0]) if len(bins) and bins[0] == 0 else 0


def add_histograms(histograms: Sequence[str | None]) -> str | None:
    """One packed histogram for several."""
    total = np.zeros(BINS, dtype=np.int64)
    for histogram in histograms:
        if histogram is None:
            return None
        bins, counts = counts_of(histogram)
        total[bins] += counts
    return pack_histogram(total)


def select_rank(histogram: str, rank: int) -> list[int]:
    """The bin of the ``rank``-th largest value (from 1), and the rank of that value within its bin."""
    bins, counts = (found[::-1] for found in counts_of(histogram))
    totals = np.cumsum(counts)
    at = int(np.searchsorted(totals, rank))
    if at == len(totals):
        raise ValueError("the survey did not see the whole tensor: its histogram holds too few elements")
    return [int(bins[at]), rank - int(totals[at] - counts[at])]
