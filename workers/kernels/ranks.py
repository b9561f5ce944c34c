"""The k-th largest of many integers from counts of them, in as few passes over them as a good guess allows.

A pass counts what falls into each of the bins of a window, and what is above it. Whatever was guessed, the answer
is exact: a window that missed it tells on which side it is, and bins wider than one value are looked into again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW_BITS = 18
BINS = 1 << WINDOW_BITS
"""Of a window at most: 1 MiB of 32-bit counts."""

VALUE_BITS = 31
"""Of the integers: magnitude bits of float32."""

SAMPLE = 1 << 17
"""Values that a guess is made from. So few are sorted at once rather than counted."""

_COMMON = 1 / 8
"""Share of a bracket from which on a value is looked at by itself. In a window its many counts would wait for each
other, and where values repeat so often, the wanted one is most likely such a one."""

_DEVIATIONS = 3
"""Of the sample's rank, to each side, that a bracket covers: of samples drawn independently, 1 in 370 would miss."""

Bits = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Window:
    """Bins of ``1 << shift`` values each, from ``low`` on."""

    low: int
    """The smallest value in it."""
    bins: int
    """How many there are, at most ``BINS``."""
    shift: int = 0
    """Bits of a value that a bin does not tell."""

    @classmethod
    def over(cls, low: int, high: int) -> Window:
        """The finest one that has all values from ``low`` to below ``high``."""
        shift = max(0, (high - low - 1).bit_length() - WINDOW_BITS)
        return cls(low, -((low - high) >> shift), shift)

    @property
    def top(self) -> int:
        """The smallest value above it."""
        return self.low + (self.bins << self.shift)


Count = Callable[[Window], tuple[npt.NDArray[np.integer], int]]
"""``window -> how many values are in each bin, and how many are above them all``."""

CountFrom = Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.integer]]
"""``pivots -> how many values are at least as large as each``: quicker than a window of many bins."""


def rank_in(counts: npt.NDArray[np.integer], rank: int) -> tuple[int, int]:
    """The bin of the ``rank``-th largest value (from 1), and the rank of that value within its bin.

    :raises ValueError: there are not so many values.
    """
    totals = np.cumsum(counts[::-1], dtype=np.int64)
    at = int(np.searchsorted(totals, rank))
    if at == len(totals):
        raise ValueError(f"rank {rank} of {int(totals[-1])} values")
    found = len(totals) - 1 - at
    return found, rank - int(totals[at] - counts[found])


def largest_of(values: Bits, rank: int) -> tuple[int, int]:
    """The ``rank``-th largest of some values (from 1), and how many equal to it are among the ``rank`` largest."""
    at = values.size - rank
    value = np.partition(values, at)[at]
    return int(value), rank - int(np.count_nonzero(values > value))


@dataclass(frozen=True, slots=True)
class Bracket:
    """Where a value probably is."""

    low: int
    """The smallest it may well be."""
    high: int
    """The largest."""
    common: Bits
    """The values between that are many times in it, ascending."""


def bracket(sample: Bits, rank: int, numel: int) -> Bracket:
    """Where the ``rank``-th largest of ``numel`` values probably is, by a sample of them."""
    share = rank / numel
    spread = _DEVIATIONS * (share * (1 - share) * sample.size) ** 0.5 + 1
    ends = (sample.size * (1 - share) + side * spread for side in (-1, 1))
    low, high = (min(max(int(end), 0), sample.size - 1) for end in ends)
    ordered = np.partition(sample, (low, high))
    values, counts = np.unique(ordered[low : high + 1], return_counts=True)
    common = values[counts >= _COMMON * counts.sum()]
    return Bracket(int(values[0]), int(values[-1]), common)


def largest(count: Count, count_from: CountFrom, rank: int, guess: Bracket) -> tuple[int, int]:
    """The ``rank``-th largest value (from 1), and how many equal to it are among the ``rank`` largest.

    :raises ValueError: there are not so many values.
    """
    low, high = 0, 1 << VALUE_BITS  # it is from low on, and below high
    window = Window.over(guess.low, guess.high + 1)
    if guess.common.size:
        ends = np.array([guess.low, guess.high + 1], dtype=np.uint32)
        pivots = np.unique(np.concatenate((guess.common, guess.common + 1, ends)))
        reach = count_from(pivots)
        at = int(np.count_nonzero(reach >= rank)) - 1  # the last pivot that so many values reach
        above = int(reach[at + 1]) if at + 1 < pivots.size else 0
        low = int(pivots[at]) if at >= 0 else low
        high = int(pivots[at + 1]) if at + 1 < pivots.size else high
        if at >= 0 and high - low == 1:
            return low, rank - above
        window = Window.over(low, high)
    while low < high:
        counts, above = count(window)
        within = int(counts.sum(dtype=np.int64))
        if rank <= above:
            low = window.top
        elif rank > above + within:
            high = window.low
        else:
            found_bin, left = rank_in(counts, rank - above)
            if window.shift == 0:
                return window.low + found_bin, left
            low = window.low + (found_bin << window.shift)
            high = low + (1 << window.shift)
        window = Window.over(low, high)
    raise ValueError(f"there is no {rank}-th largest value")
