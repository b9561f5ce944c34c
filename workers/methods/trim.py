"""TIES' first step, exact and out of core: the k-th largest magnitude of each task vector by radix histogram.

The magnitude bits of a float32 are ordered as the magnitudes are. A first pass counts their high 16 bits, a
second the low 16 bits within the one bin that holds the k-th largest; together they are the threshold, bit
for bit. Only when exactly k elements shall be kept does a third pass count the equal ones per block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from workers.kernels import reference
from workers.methods.base import Block, Summary, SurveyPass
from workers.methods.common import EqualMagnitudes
from workers.task import SURVEY_ELEMENTS, Facts

Vectors = Callable[[Block, Facts], Sequence[torch.Tensor]]
"""``(block, facts) -> one float32 vector a model``: what is trimmed."""

_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Trim:
    """How the models' task vectors are trimmed."""

    densities: tuple[float, ...]
    """The fraction of each that is kept."""
    keep_count: reference.KeepCount
    """How that fraction becomes a number of elements."""
    equal_magnitudes: EqualMagnitudes
    """Whether all elements equal to the k-th stay, or the first of them up to k."""

    @property
    def thresholded(self) -> tuple[bool, ...]:
        """Which models have a threshold: those that neither keep all nor nothing."""
        return tuple(
            density < 1 and reference.keep_count(density, 1, self.keep_count) > 0
            for density in self.densities
        )

    def passes(self, vectors: Vectors) -> tuple[SurveyPass, ...]:
        """The passes that find the thresholds of ``vectors``; none when no model has one."""
        if not any(self.thresholded):
            return ()
        passes = (HighHistogram(self, vectors), LowHistogram(self, vectors))
        return (*passes, Equals(self, vectors)) if self.equal_magnitudes == "exact_k" else passes

    def after(self, vectors: Vectors) -> Vectors:
        """``vectors``, then trimmed."""
        return lambda block, facts: self.apply(vectors(block, facts), facts, block.first)

    def apply(self, vectors: Sequence[torch.Tensor], facts: Facts, first: int) -> list[torch.Tensor]:
        """The trimmed ``vectors`` of the block whose first element is ``first``."""
        return [self._apply(model, vector, facts, first) for model, vector in enumerate(vectors)]

    def _apply(self, model: int, vector: torch.Tensor, facts: Facts, first: int) -> torch.Tensor:
        if self.densities[model] >= 1:
            return vector
        if not self.thresholded[model]:
            return reference.zero_but_nan(vector)
        threshold = facts["trim_threshold"][model]
        if self.equal_magnitudes == "keep":
            return reference.trim(vector, threshold)
        last_block, take = facts["trim_cut"][model]
        block = first // SURVEY_ELEMENTS
        if block == last_block:
            return reference.trim_equals(vector, threshold, take)
        return reference.trim(vector, threshold if block < last_block else threshold + 1)


@dataclass(frozen=True)
class _TrimPass(SurveyPass):
    trim: Trim
    """How the vectors are trimmed."""
    vectors: Vectors
    """What is trimmed."""

    def _bits(self, block: Block, facts: Facts) -> list[torch.Tensor | None]:
        """Each thresholded vector's magnitude bits, non-finite ones as zero."""
        return [
            reference.finite_bits(vector) if wanted else None
            for vector, wanted in zip(self.vectors(block, facts), self.trim.thresholded, strict=True)
        ]


class _Histogram(_TrimPass):
    """Counts per bin; a summary lists ``[bins, counts]`` per model, null for one without a threshold."""

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return [_add(histograms) for histograms in zip(*summaries, strict=True)]


class HighHistogram(_Histogram):
    """Pass 1: the high 16 bits. Adds ``trim_high``: per model the bin, and the k-th's rank within it."""

    def summarise(self, block: Block, facts: Facts) -> Summary:
        return [None if bits is None else _count(bits >> 16) for bits in self._bits(block, facts)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        ranks = (
            reference.keep_count(density, numel, self.trim.keep_count) for density in self.trim.densities
        )
        return {
            "trim_high": [
                None if histogram is None else _select(histogram, rank)
                for histogram, rank in zip(summary, ranks, strict=True)
            ]
        }


class LowHistogram(_Histogram):
    """Pass 2: the low 16 bits within that bin.

    Adds ``trim_threshold``: the k-th magnitude's bits; ``trim_equals``: how many equal to it make up k.
    """

    def summarise(self, block: Block, facts: Facts) -> Summary:
        return [
            None if bits is None else _count(bits - (high[0] << 16))
            for bits, high in zip(self._bits(block, facts), facts["trim_high"], strict=True)
        ]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        thresholds: list[int | None] = []
        equals: list[int | None] = []
        for histogram, high in zip(summary, facts["trim_high"], strict=True):
            low, rank = (None, None) if histogram is None else _select(histogram, high[1])
            thresholds.append(None if low is None else (high[0] << 16) | low)
            equals.append(rank)
        return {"trim_threshold": thresholds, "trim_equals": equals}


class Equals(_TrimPass):
    """Pass 3, for exactly k: the elements equal to the threshold, per block.

    Adds ``trim_cut``: per model the block where the k-th lies, and how many equal ones that block keeps. A
    summary maps the block's number to the count of each model.
    """

    def summarise(self, block: Block, facts: Facts) -> Summary:
        counts = [
            0 if bits is None else int(torch.eq(bits, threshold, out=bits).sum())
            for bits, threshold in zip(self._bits(block, facts), facts["trim_threshold"], strict=True)
        ]
        return {str(block.first // SURVEY_ELEMENTS): counts}

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return {number: counts for summary in summaries for number, counts in summary.items()}

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


def _count(values: torch.Tensor) -> list[list[int]]:
    """The sparse histogram ``[bins, counts]`` of the int32 values from 0 to 65535, leaving out all others."""
    # Two bins more, for what lies below and above: cheaper than picking the rest out first.
    counts = torch.bincount(values.clamp_(-1, _BINS).add_(1), minlength=_BINS + 2)[1:-1]
    bins = torch.nonzero(counts).flatten()
    return [bins.tolist(), counts[bins].tolist()]


def _add(histograms: Sequence[list[list[int]] | None]) -> list[list[int]] | None:
    """One sparse histogram for several."""
    total = np.zeros(_BINS, dtype=np.int64)
    for histogram in histograms:
        if histogram is None:
            return None
        bins, counts = np.asarray(histogram, dtype=np.int64)
        total[bins] += counts
    (filled,) = np.nonzero(total)
    return [filled.tolist(), total[filled].tolist()]


def _select(histogram: list[list[int]], rank: int) -> list[int]:
    """The bin of the ``rank``-th largest value (from 1), and the rank of that value within its bin."""
    for value, count in zip(reversed(histogram[0]), reversed(histogram[1]), strict=True):
        if rank <= count:
            return [value, rank]
        rank -= count
    raise ValueError("the survey did not see the whole tensor: its histogram holds too few elements")
