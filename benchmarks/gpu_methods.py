"""Every merge method as :mod:`benchmarks.gpu` runs it: its survey, and the formula that this makes.

Written again from their definitions, since the service's own methods are described by pydantic models, which a
machine with a GPU need not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from workers.kernels.base import PAIR, PAIRS, Counts, Election, Formula, Kernels, Operands, Term
from workers.kernels.scalars import keep_bound, keep_count, slerp_coefficients, weight_sum

WEIGHTS = (0.5, 0.3, 0.4)
DENSITY = 0.3
VECTORS = Formula(tuple(Term(model, weight) for model, weight in enumerate(WEIGHTS)), task_vectors=True)

Surveyed = tuple[Formula, list[float]]
"""What merges a tensor, and the numbers that its survey found."""


@dataclass(frozen=True)
class Method:
    """A merge method, with parameters."""

    name: str
    """What is printed."""
    survey: Callable[[Kernels, Operands], Surveyed]
    """Passes over a whole tensor, and the formula that they make."""
    models: int = 3
    """How many fine-tunes it takes."""
    base: bool = True
    """Whether it takes the base."""
    passes: int = 1
    """How often each input byte goes to the device."""


def _linear(kernels: Kernels, operands: Operands) -> Surveyed:
    return replace(VECTORS, task_vectors=False, divide=weight_sum(WEIGHTS)), []


def _slerp(kernels: Kernels, operands: Operands) -> Surveyed:
    sums = kernels.products(operands, PAIR, PAIRS)
    first, second, dot = (math.fsum(column) for column in sums.T.tolist())
    coefficients = slerp_coefficients(0.4, first, second, dot)
    return Formula((Term(0, coefficients[0]), Term(1, coefficients[1]))), sums.ravel().tolist()


def _trimmed(kernels: Kernels, operands: Operands, formula: Formula, exact: bool = False) -> Surveyed:
    """TIES, each term trimmed to its largest magnitudes; with ``exact``, to so many of those equal to the threshold."""
    rank = keep_count(DENSITY, operands.numel)
    bins = [_select(counts, rank) for counts in _histogram(kernels, operands, formula, None)]
    low = _histogram(kernels, operands, formula, [high for high, _ in bins])
    within = [_select(counts, left) for counts, (_, left) in zip(low, bins, strict=True)]
    bits = [(high << 16) | low for (high, _), (low, _) in zip(bins, within, strict=True)]
    cuts: list[tuple[int, int] | None] = [None] * len(bits)
    if exact:
        equal = kernels.equal_counts(operands, formula, bits).T
        cuts = [_cut(counts, left) for counts, (_, left) in zip(equal, within, strict=True)]
    terms = tuple(
        replace(term, threshold=threshold, cut=cut)
        for term, threshold, cut in zip(formula.terms, bits, cuts, strict=True)
    )
    numbers = [float(number) for cut in cuts if cut is not None for number in cut]
    return replace(formula, terms=terms, election=Election(1, "abs_weights")), [*bits, *numbers]


def _histogram(kernels: Kernels, operands: Operands, formula: Formula, high: Sequence[int] | None) -> Counts:
    counts = np.zeros((len(formula.terms), 1 << 16), dtype=np.int64)
    kernels.histogram(operands, formula, high, counts)
    return counts


def _select(counts: Counts, rank: int) -> tuple[int, int]:
    """The bin of the ``rank``-th largest value, and its rank within the bin."""
    above = np.cumsum(counts[::-1])
    at = int(np.searchsorted(above, rank))
    return len(counts) - 1 - at, rank - int(above[at - 1] if at else 0)


def _cut(counts: Counts, left: int) -> tuple[int, int]:
    """The block in which the last of the equal elements that stay lies, and how many of its own stay."""
    totals = np.cumsum(counts)
    at = int(np.searchsorted(totals, left))
    return at, left - int(totals[at] - counts[at])


def _dropped(factor: float) -> Formula:
    return replace(
        VECTORS,
        terms=tuple(replace(term, keep_below=keep_bound(DENSITY), factor=factor) for term in VECTORS.terms),
    )


def _dare_l1(kernels: Kernels, operands: Operands) -> Surveyed:
    dropped = _dropped(1.0)
    norms = kernels.norms(operands, dropped)
    terms = []
    for term, (before, after) in zip(dropped.terms, norms.transpose(1, 2, 0).tolist(), strict=True):
        kept = math.fsum(after)
        terms.append(replace(term, factor=math.fsum(before) / kept if kept else 1.0))
    return replace(dropped, terms=tuple(terms)), norms.ravel().tolist()


METHODS = (
    Method("passthrough", lambda kernels, operands: (Formula((Term(0),)), []), 1, base=False),
    Method("linear", _linear, base=False),
    Method("slerp", _slerp, 2, base=False, passes=2),
    Method("task_arithmetic", lambda kernels, operands: (VECTORS, [])),
    Method("ties", lambda kernels, operands: _trimmed(kernels, operands, VECTORS), passes=3),
    Method("dare_linear", lambda kernels, operands: (_dropped(1 / DENSITY), [])),
    Method("dare_linear, l1", _dare_l1, passes=2),
    Method("dare_ties", lambda kernels, operands: (replace(_dropped(1 / DENSITY), election=Election()), [])),
    Method(
        "dare_ties, exact k",
        lambda kernels, operands: _trimmed(kernels, operands, _dropped(1 / DENSITY), exact=True),
        passes=4,
    ),
)
"""Every method. All are elementwise once their survey is done, so all outputs are compared bit by bit; and so are the
numbers of the surveys, whose sums are float64 by a fixed tree."""
