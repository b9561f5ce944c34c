"""TIES' first step, exact and out of core: the k-th largest magnitude of each task vector by radix histogram.

The magnitude bits of a float32 are ordered as the magnitudes are. A first pass counts their high 16 bits, a
second the low 16 bits within the one bin that holds the k-th largest; together they are the threshold, bit
for bit. Only when exactly k elements shall be kept does a third pass count the equal ones per block.
"""

from __future__ import annotations

import base64
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from workers.kernels import reference
from workers.methods.base import Block, Summary, SurveyPass
from workers.methods.common import EqualMagnitudes
from workers.task import SURVEY_ELEMENTS, Facts

Vectors = Callable[[Block, Facts], Sequence[torch.Tensor]]
"""``(block, facts) -> one float32 vector a model``: what is trimmed."""

Counts = npt.NDArray[np.int64]

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

    def _bits(self, block: Block, facts: Facts) -> Iterator[torch.Tensor | None]:
        """Each thresholded vector's magnitude bits, non-finite ones as zero; one model at a time is held."""
        for vector, wanted in zip(self.vectors(block, facts), self.trim.thresholded, strict=True):
            yield reference.finite_bits(vector) if wanted else None


class _Histogram(_TrimPass):
    """Counts per bin of 16 bits; a summary has one packed histogram a model, null for one without a threshold.

    While blocks are counted, a model costs one array of 65,536 counts, whatever they hold.
    """

    @abstractmethod
    def _values(self, bits: torch.Tensor, model: int, facts: Facts) -> torch.Tensor:
        """The 16 bits that are counted, as int32; what lies outside 0 to 65535 is not. May overwrite ``bits``."""

    def summarise(self, block: Block, facts: Facts) -> Summary:
        return self.accumulate([block], facts)

    def accumulate(self, blocks: Iterable[Block], facts: Facts) -> Summary:
        totals: list[torch.Tensor | None] = [None] * len(self.trim.densities)
        for block in blocks:
            for model, bits in enumerate(self._bits(block, facts)):
                if bits is not None:
                    counts, total = _count(self._values(bits, model, facts)), totals[model]
                    totals[model] = counts if total is None else total.add_(counts)
        return [None if total is None else _pack(total.cpu().numpy()) for total in totals]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        if len(summaries) == 1:
            return summaries[0]
        return [_add(histograms) for histograms in zip(*summaries, strict=True)]


class HighHistogram(_Histogram):
    """Pass 1: the high 16 bits. Adds ``trim_high``: per model the bin, and the k-th's rank within it."""

    def _values(self, bits: torch.Tensor, model: int, facts: Facts) -> torch.Tensor:
        return bits.bitwise_right_shift_(16)

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

    def _values(self, bits: torch.Tensor, model: int, facts: Facts) -> torch.Tensor:
        return bits.sub_(facts["trim_high"][model][0] << 16)

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


def _count(values: torch.Tensor) -> torch.Tensor:
    """How often each value from 0 to 65535 is among int32 ``values``, which are overwritten: int64 counts."""
    # Two bins more, for what lies below and above: cheaper than picking the rest out first.
    return torch.bincount(values.clamp_(-1, _BINS).add_(1), minlength=_BINS + 2)[1:-1]


def _pack(counts: Counts) -> str:
    """A histogram as text: base64 of zlib of the gaps between filled bins (uint16) and their counts (int64)."""
    (bins,) = np.nonzero(counts > 0)  # of booleans it is several times as fast
    gaps = bins.astype("<u2")
    gaps[1:] -= gaps[:-1].copy()
    raw = gaps.tobytes() + counts[bins].astype("<i8").tobytes()
    return base64.b64encode(zlib.compress(raw, level=1)).decode("ascii")


def _unpack(histogram: str) -> tuple[Counts, Counts]:
    """The filled bins of a packed histogram, ascending, and their counts."""
    raw = zlib.decompress(base64.b64decode(histogram))
    filled = len(raw) // 10
    gaps = np.frombuffer(raw, "<u2", filled)
    return np.cumsum(gaps, dtype=np.int64), np.frombuffer(raw, "<i8", filled, offset=2 * filled)


def _add(histograms: Sequence[str | None]) -> str | None:
    """One packed histogram for several."""
    total = np.zeros(_BINS, dtype=np.int64)
    for histogram in histograms:
        if histogram is None:
            return None
        bins, counts = _unpack(histogram)
        total[bins] += counts
    return _pack(total)


def _select(histogram: str, rank: int) -> list[int]:
    """The bin of the ``rank``-th largest value (from 1), and the rank of that value within its bin."""
    bins, counts = (found[::-1] for found in _unpack(histogram))
    totals = np.cumsum(counts)
    at = int(np.searchsorted(totals, rank))
    if at == len(totals):
        raise ValueError("the survey did not see the whole tensor: its histogram holds too few elements")
    return [int(bins[at]), rank - int(totals[at] - counts[at])]
