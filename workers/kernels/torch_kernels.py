"""Formulas and statistics in torch, on whatever device they are carried to: the meaning that ``cpu`` has to match.

A run is walked in steps of whole survey blocks (:mod:`workers.kernels.conveyor`), and only what is worked on is
widened to float32, so the workspace does not grow with the run. How many blocks a step has changes nothing: what is
counted is counted of all, and what is summed is summed block by block. Results are added up on the device and read
once. Each step is made of functions of :mod:`workers.kernels.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import reference
from workers.kernels.base import (
    KEEP_ALL,
    NO_CEILING,
    Counts,
    Formula,
    Found,
    Operands,
    Pairs,
    Sums,
    Term,
    has_task_vectors,
    refuse_cuts,
)
from workers.kernels.conveyor import Carrier, InPlace
from workers.kernels.ranks import rank_in
from workers.random import words_below

_BINS = 1 << 16


class TorchKernels:
    """The reference implementation of :class:`workers.kernels.base.Kernels`."""

    def __init__(self, carrier: Carrier | None = None) -> None:
        """
        :param carrier: what brings the elements to the device; else they stay, and are walked a block at a time.
        """
        self._carrier = carrier or InPlace()

    def merge(self, operands: Operands, formula: Formula, out: torch.Tensor) -> Found:
        """Write the merged elements to ``out``, and say what was found."""
        counts = self._zeros(len(operands.inputs) + 1)

        def step(run: Operands) -> torch.Tensor:
            merged = reference.round_to(_merged(run, formula), out.dtype)
            counts.add_(_not_finite(run, merged))
            return merged

        cuts = [term.cut[0] for term in formula.terms if term.cut is not None]
        self._carrier.carry(operands, step, out, cuts)
        *nonfinite, overflowed = counts.tolist()
        return Found(tuple(nonfinite), overflowed)

    def nonfinite(self, operands: Operands) -> tuple[int, ...]:
        """NaN and infinities of each input, the base first."""
        counts = self._zeros(len(operands.inputs))

        def step(run: Operands) -> None:
            finite = [torch.count_nonzero(torch.isfinite(elements)) for elements in run.inputs]
            counts.add_(run.numel - torch.stack(finite))

        self._carrier.carry(operands, step)
        return tuple(counts.tolist())

    def histogram(
        self, operands: Operands, formula: Formula, high: Sequence[int] | None, counts: Counts
    ) -> None:
        """Count the high 16 magnitude bits of each term, or the low ones within its bin ``high``, into ``counts``."""
        found = self._zeros(len(counts), _BINS)

        def step(run: Operands) -> None:
            vectors = _sparse_terms(run, formula) if formula.program is None else _finite_rows(run, formula)
            for index, vector in enumerate(vectors):
                bits = reference.finite_bits(vector)
                values = bits.bitwise_right_shift_(16) if high is None else bits.sub_(high[index] << 16)
                found[index].add_(_count(values))

        self._carrier.carry(operands, step)
        counts += found.cpu().numpy()

    def largest(
        self, operands: Operands, formula: Formula, ranks: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Of each term the bits of its ``rank``-th largest magnitude, and how many equal ones make up the rank."""
        highs = np.zeros((len(ranks), _BINS), dtype=np.int64)
        self.histogram(operands, formula, None, highs)
        found = [rank_in(counts, rank) for counts, rank in zip(highs, ranks, strict=True)]
        lows = np.zeros_like(highs)
        self.histogram(operands, formula, [high for high, _ in found], lows)
        within = (rank_in(counts, left) for counts, (_, left) in zip(lows, found, strict=True))
        return tuple(
            ((high << 16) | low, equals) for (high, _), (low, equals) in zip(found, within, strict=True)
        )

    def equal_counts(self, operands: Operands, formula: Formula, thresholds: Sequence[int]) -> Counts:
        """How many elements of each term have the magnitude bits of its threshold: ``[blocks, terms]``."""
        found = self._zeros(_blocks(operands), len(formula.terms))

        def step(run: Operands) -> None:
            rows = found[_rows(operands, run)]
            for index, vector in enumerate(_sparse_terms(run, formula)):
                equal = reference.finite_bits(vector) == thresholds[index]
                rows[:, index] = torch.count_nonzero(reference.by_block(equal), dim=1)

        self._carrier.carry(operands, step)
        counts: Counts = found.cpu().numpy()
        return counts

    def elected(self, operands: Operands, formula: Formula) -> int:
        """Elements whose terms' weighted sum is above zero, less those where it is below."""
        balance = self._zeros(1)

        def step(run: Operands) -> None:
            base = _base(run, formula)
            finite = (reference.finite_or_zero(_trimmed(run, base, term)) for term in formula.terms)
            total = reference.accumulate(_weighted(finite, formula))
            balance.add_(torch.count_nonzero(total > 0)).sub_(torch.count_nonzero(total < 0))

        cuts = [term.cut[0] for term in formula.terms if term.cut is not None]
        self._carrier.carry(operands, step, cuts=cuts)
        return int(balance)

    def norms(self, operands: Operands, formula: Formula) -> Sums:
        """L1 norms of each term before its drop and after, unscaled: ``[blocks, terms, 2]``."""
        found = self._zeros(_blocks(operands), len(formula.terms), 2, dtype=torch.float64)

        def step(run: Operands) -> None:
            rows, base = found[_rows(operands, run)], _base(run, formula)
            for index, term in enumerate(formula.terms):
                finite = reference.finite_or_zero(_vector(run, base, term))
                kept = _dropped(run, replace(term, factor=1.0), finite)
                for side, vector in enumerate((finite, kept)):
                    rows[:, index, side] = reference.block_sums(vector.abs().double())

        self._carrier.carry(operands, step)
        return _read(found)

    def products(self, operands: Operands, formula: Formula, pairs: Pairs) -> Sums:
        """Dot products of pairs of terms, or of outputs of the program: ``[blocks, pairs]``."""
        refuse_cuts(formula)
        found = self._zeros(_blocks(operands), len(pairs), dtype=torch.float64)

        def step(run: Operands) -> None:
            rows, vectors = found[_rows(operands, run)], _finite_rows(run, formula)
            for index, (one, two) in enumerate(pairs):
                # In float64 the products of float32 values are exact.
                rows[:, index] = reference.block_sums(vectors[one].double() * vectors[two].double())

        self._carrier.carry(operands, step)
        return _read(found)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._carrier.device)


# --- blocks -----------------------------------------------------------------------------------------------


def _blocks(operands: Operands) -> int:
    return math.ceil(operands.numel / SURVEY_ELEMENTS)


def _rows(whole: Operands, run: Operands) -> slice:
    """The survey blocks of a run, numbered from the beginning of the whole."""
    first = (run.first - whole.first) // SURVEY_ELEMENTS
    return slice(first, first + _blocks(run))


def _read(found: torch.Tensor) -> Sums:
    sums: Sums = found.cpu().numpy()
    return sums


# --- one step ---------------------------------------------------------------------------------------------


def _base(run: Operands, formula: Formula) -> torch.Tensor | None:
    """What a formula's terms are differences to, in float32; ``None`` when they are none."""
    if not has_task_vectors(run, formula) or run.base is None:
        return None
    return reference.to_float32(run.base)


def _vector(run: Operands, base: torch.Tensor | None, term: Term) -> torch.Tensor:
    """A term's model in float32, less the base when the formula is one of task vectors; or its statistic."""
    if term.statistic:
        return reference.to_float32(run.statistics[term.model])
    model = reference.to_float32(run.models[term.model])
    return model if base is None else model - base


def _dropped(run: Operands, term: Term, vector: torch.Tensor) -> torch.Tensor:
    if term.keep_below >= KEEP_ALL:
        return vector
    key = run.mask_keys[term.model] if term.keep_below else 0  # who keeps nothing draws nothing
    mask = words_below(key, run.first, run.numel, term.keep_below, vector.device)
    return reference.drop(vector, mask, term.factor)


def _sparse_terms(run: Operands, formula: Formula) -> Iterator[torch.Tensor]:
    """Each term's vector, dropped and rescaled."""
    base = _base(run, formula)
    return (_dropped(run, term, _vector(run, base, term)) for term in formula.terms)


def _trimmed(run: Operands, base: torch.Tensor | None, term: Term) -> torch.Tensor:
    """A term's vector, dropped, rescaled and trimmed; a cut's block is a run of its own."""
    vector = _dropped(run, term, _vector(run, base, term))
    if term.ceiling < NO_CEILING:
        vector = reference.lower(vector, term.ceiling)
    threshold, take = term.trim_of(run.first // SURVEY_ELEMENTS)
    if take is not None:
        return reference.trim_equals(vector, threshold, take)
    return reference.trim(vector, threshold) if threshold else vector


def _finite_rows(run: Operands, formula: Formula) -> list[torch.Tensor]:
    """The terms with NaN and infinities as zero, or what the program makes of them: for a statistic."""
    base = _base(run, formula)
    weighted = _weighted((_trimmed(run, base, term) for term in formula.terms), formula)
    finite = [reference.finite_or_zero(vector) for vector in weighted]
    return finite if formula.program is None else reference.execute(formula.program, finite)


def _merged(run: Operands, formula: Formula) -> torch.Tensor:
    base, election = _base(run, formula), formula.election
    weighted = _weighted((_trimmed(run, base, term) for term in formula.terms), formula)
    if formula.program is not None:
        (merged,) = reference.execute(formula.program, weighted)
    else:
        merged = reference.accumulate(weighted)
    if election is not None and formula.program is None:
        signs = reference.elect(merged, election.zero_sign)
        weights = [term.weight for term in formula.terms]
        merged = reference.disjoint_merge(weighted, weights, signs, election.divisor)
    if formula.divide is not None:
        merged = reference.divide(merged, formula.divide)
    merged = reference.scale(merged, formula.lambda_)
    return merged if base is None else base + merged


def _weighted(vectors: Iterable[torch.Tensor], formula: Formula) -> list[torch.Tensor]:
    """Each term's vector times its weight; made one by one, so that nothing else of them is held."""
    return reference.weigh(vectors, [term.weight for term in formula.terms])


def _not_finite(run: Operands, merged: torch.Tensor) -> torch.Tensor:
    """NaN and infinities of each input, and outputs that are not finite though all inputs of theirs are."""
    overflowed = torch.isfinite(merged).logical_not_()
    counts = []
    for elements in run.inputs:
        finite = torch.isfinite(elements)
        overflowed &= finite
        counts.append(run.numel - torch.count_nonzero(finite))
    return torch.stack([*counts, torch.count_nonzero(overflowed)])


def _count(values: torch.Tensor) -> torch.Tensor:
    """How often each value from 0 to 65535 is among int32 ``values``, which are overwritten."""
    # Two bins more, for what lies below and above: cheaper than picking the rest out first.
    return torch.bincount(values.clamp_(-1, _BINS).add_(1), minlength=_BINS + 2)[1:-1]
