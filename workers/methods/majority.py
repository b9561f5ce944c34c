"""The majority of the elected signs, for the authors' zero-sum rule, in most cases without a pass of its own.

The signs that elements elect hang on the thresholds, which are known only after the trim's second pass. But the
first knows each but for its low 16 bits, and guesses these; the second elects by the guess beside finding the
thresholds. What the guess got wrong is then counted, and bounds how far the balance of signs can be off:

Let g and t be the guessed and the exact thresholds of the models, and w the number of elements, of all models
together, whose magnitude bits are from ``min(g, t)`` on and below ``max(g, t)`` of their model. Only these are
kept by one and not by the other. So at most w positions of the output elect another sign, each of which moves the
balance of signs by 2 at most (from 1 to -1), and ``|balance(t) - balance(g)| <= 2w``. g and t of a model share
their high 16 bits, so the second pass' histogram of the low ones has counted exactly the elements of w. Hence a
``balance(g) > 2w`` shows ``balance(t) > 0``, and ``balance(g) <= -2w`` shows ``balance(t) <= 0``, where the elected
sign is ``-``. In between the third pass counts. (Non-finite elements are zero to both statistics, and elect
nothing, kept or not.)

The guess never enters the merge: a bad one only costs the third pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Formula, Kernels, Operands
from workers.methods.base import Summary, SurveyPass
from workers.methods.elect import ElectedSigns
from workers.methods.trim import BINS, HighHistogram, LowHistogram, Trim, TrimmingParameters, counts_of
from workers.task import Facts


class GuessingHigh(HighHistogram):
    """Pass 1: the high 16 bits. Adds ``trim_guess``: per model a threshold within the bin of the k-th.

    A summary has the histograms, and whether there was float32 among the inputs.
    """

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        wide = any(elements.dtype.itemsize == 4 for elements in operands.inputs)
        return [super().accumulate(kernels, operands, facts), wide]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        histograms, wide = zip(*summaries, strict=True)
        return [super().combine(histograms), any(wide)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        histograms, wide = summary
        found = super().conclude(histograms, numel, facts)
        guesses = [
            None if histogram is None else _guess(histogram, high[0], high[1], wide)
            for histogram, high in zip(histograms, found["trim_high"], strict=True)
        ]
        return found | {"trim_guess": guesses}


class BoundingLow(LowHistogram):
    """Pass 2: the low 16 bits, and the balance of the signs elected by the guess. Adds ``zero_sign`` if it is certain.

    A summary has the histograms, and that balance.
    """

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        guessed = self.trim.terms(facts | {"trim_threshold": facts["trim_guess"]})
        balance = kernels.elected(operands, Formula(guessed, task_vectors=True))
        return [super().accumulate(kernels, operands, facts), balance]

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        histograms, balances = zip(*summaries, strict=True)
        return [super().combine(histograms), sum(balances)]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        histograms, balance = summary
        found = super().conclude(histograms, numel, facts)
        ranges = zip(histograms, facts["trim_guess"], found["trim_threshold"], strict=True)
        wrong = sum(_between(*each) for each in ranges if each[0] is not None)
        if balance > 2 * wrong:
            return found | {"zero_sign": 1}
        return found | {"zero_sign": -1} if balance <= -2 * wrong else found


def trim_and_election_passes(parameters: TrimmingParameters, trim: Trim) -> tuple[SurveyPass, ...]:
    """The passes that find the thresholds, and the sign of zero sums unless it is always ``+``."""
    passes = trim.passes()
    if parameters.zero_sign != "majority":
        return passes
    if passes and trim.equal_magnitudes == "keep":
        passes = (GuessingHigh(trim), BoundingLow(trim))
    return (*passes, ElectedSigns(trim.terms))


def _guess(histogram: str, high: int, rank: int, wide: bool) -> int:
    """Bits near those of the ``rank``-th largest magnitude of a bin.

    Differences of 16-bit floats have few significant bits: most have no others than the high ones. Those of float32
    fill the bin, about evenly.
    """
    if not wide:
        return high << 16
    bins, counts = counts_of(histogram)
    filled = int(counts[bins == high][0])
    return (high << 16) + BINS * (2 * (filled - rank) + 1) // (2 * filled)


def _between(histogram: str, guess: int, threshold: int) -> int:
    """How many elements of a bin's histogram lie from the lower of the two on and below the upper."""
    lower, upper = sorted((guess % BINS, threshold % BINS))
    bins, counts = counts_of(histogram)
    return int(counts[(bins >= lower) & (bins < upper)].sum())
