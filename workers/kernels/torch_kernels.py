"""Formulas and statistics in torch, on whatever device the operands are: the meaning that ``cpu`` has to match.

A run is walked block by block of the survey grid, and only one block at a time is widened to float32, so the
workspace does not grow with the run. Each step is a function of :mod:`workers.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from workers.kernels import reference
from workers.kernels.base import KEEP_ALL, Counts, Formula, Found, Operands, Sums, Term
from workers.random import words_below
from workers.task import SURVEY_ELEMENTS

_BINS = 1 << 16


class TorchKernels:
    """The reference implementation of :class:`workers.kernels.base.Kernels`."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    def place(self, operands: Operands) -> Operands:
        """The operands on the device; those that are there already are not copied."""
        base = None if operands.base is None else operands.base.to(self._device)
        return replace(operands, base=base, models=tuple(model.to(self._device) for model in operands.models))

    def merge(self, operands: Operands, formula: Formula, out: torch.Tensor) -> Found:
        """Write the merged elements to ``out``, and say what was found."""
        nonfinite = [0] * len(operands.inputs)
        overflowed = 0
        for block in _blocks(operands):
            merged = reference.round_to(_merged(block, formula), out.dtype)
            start = block.first - operands.first
            out[start : start + block.numel] = merged
            for number, elements in enumerate(block.inputs):
                nonfinite[number] += _nonfinite(elements)
            overflowed += _overflowed(block, merged)
        return Found(tuple(nonfinite), overflowed)

    def nonfinite(self, operands: Operands) -> tuple[int, ...]:
        """NaN and infinities of each input, the base first."""
        counts = [[_nonfinite(elements) for elements in block.inputs] for block in _blocks(operands)]
        return tuple(sum(column) for column in zip(*counts, strict=True))

    def histogram(
        self, operands: Operands, formula: Formula, high: Sequence[int] | None, counts: Counts
    ) -> None:
        """Count the high 16 magnitude bits of each term, or the low ones within its bin ``high``, into ``counts``."""
        for block in _blocks(operands):
            for index, term in enumerate(formula.terms):
                bits = reference.finite_bits(_sparse(block, formula, term))
                values = bits.bitwise_right_shift_(16) if high is None else bits.sub_(high[index] << 16)
                counts[index] += _count(values)

    def equal_counts(self, operands: Operands, formula: Formula, thresholds: Sequence[int]) -> Counts:
        """How many elements of each term have the magnitude bits of its threshold: ``[blocks, terms]``."""
        counts = [
            [
                int(torch.count_nonzero(reference.finite_bits(_sparse(block, formula, term)) == threshold))
                for term, threshold in zip(formula.terms, thresholds, strict=True)
            ]
            for block in _blocks(operands)
        ]
        return np.array(counts, dtype=np.int64).reshape(-1, len(formula.terms))

    def elected(self, operands: Operands, formula: Formula) -> int:
        """Elements whose terms' weighted sum is above zero, less those where it is below."""
        balance = 0
        for block in _blocks(operands):
            finite = (reference.finite_or_zero(_trimmed(block, formula, term)) for term in formula.terms)
            total = reference.accumulate(reference.weigh(tuple(finite), _weights(formula)))
            balance += int(torch.count_nonzero(total > 0)) - int(torch.count_nonzero(total < 0))
        return balance

    def norms(self, operands: Operands, formula: Formula) -> Sums:
        """L1 norms of each term before its drop and after, unscaled: ``[blocks, terms, 2]``."""
        norms = []
        for block in _blocks(operands):
            for term in formula.terms:
                finite = reference.finite_or_zero(_vector(block, formula, term))
                kept = _dropped(block, replace(term, factor=1.0), finite)
                norms.append([reference.block_sum(x.abs().double()) for x in (finite, kept)])
        return np.array(norms, dtype=np.float64).reshape(-1, len(formula.terms), 2)

    def products(self, operands: Operands) -> Sums:
        """Both squared norms of two models and their dot product: ``[blocks, 3]``."""
        products = []
        for block in _blocks(operands):
            # In float64 the products of float32 values are exact.
            first, second = (reference.finite_or_zero(reference.to_float32(x)).double() for x in block.models)
            pairs = (first, first), (second, second), (first, second)
            products.append([reference.block_sum(x * y) for x, y in pairs])
        return np.array(products, dtype=np.float64).reshape(-1, 3)


def _blocks(operands: Operands) -> Iterator[Operands]:
    """The operands block by block; the base, which every term may need, is float32 already."""
    for start in range(0, operands.numel, SURVEY_ELEMENTS):
        run = slice(start, start + SURVEY_ELEMENTS)
        yield Operands(
            first=operands.first + start,
            base=None if operands.base is None else reference.to_float32(operands.base[run]),
            models=tuple(model[run] for model in operands.models),
            mask_keys=operands.mask_keys,
        )


# --- one block --------------------------------------------------------------------------------------------


def _vector(block: Operands, formula: Formula, term: Term) -> torch.Tensor:
    """A term's model in float32, less the base when the formula is one of task vectors."""
    model = reference.to_float32(block.models[term.model])
    return model - _base(block) if formula.task_vectors else model


def _dropped(block: Operands, term: Term, vector: torch.Tensor) -> torch.Tensor:
    if term.keep_below >= KEEP_ALL:
        return vector
    key = block.mask_keys[term.model] if term.keep_below else 0  # who keeps nothing draws nothing
    mask = words_below(key, block.first, block.numel, term.keep_below)
    return reference.drop(vector, mask.to(vector.device), term.factor)


def _sparse(block: Operands, formula: Formula, term: Term) -> torch.Tensor:
    """A term's vector, dropped and rescaled."""
    return _dropped(block, term, _vector(block, formula, term))


def _trimmed(block: Operands, formula: Formula, term: Term) -> torch.Tensor:
    """A term's vector, dropped, rescaled and trimmed."""
    vector = _sparse(block, formula, term)
    threshold, take = term.trim_of(block.first // SURVEY_ELEMENTS)
    if take is not None:
        return reference.trim_equals(vector, threshold, take)
    return reference.trim(vector, threshold) if threshold else vector


def _merged(block: Operands, formula: Formula) -> torch.Tensor:
    weights, election = _weights(formula), formula.election
    weighted = reference.weigh([_trimmed(block, formula, term) for term in formula.terms], weights)
    merged = reference.accumulate(weighted)
    if election is not None:
        signs = reference.elect(merged, election.zero_sign)
        merged = reference.disjoint_merge(weighted, weights, signs, election.divisor)
    if formula.divide is not None:
        merged = reference.divide(merged, formula.divide)
    merged = reference.scale(merged, formula.lambda_)
    return _base(block) + merged if formula.task_vectors else merged


def _base(block: Operands) -> torch.Tensor:
    if block.base is None:
        raise ValueError("task vectors need the base model's elements")
    return block.base


def _weights(formula: Formula) -> list[float]:
    return [term.weight for term in formula.terms]


def _nonfinite(elements: torch.Tensor) -> int:
    return elements.numel() - int(torch.count_nonzero(torch.isfinite(elements)))


def _overflowed(block: Operands, merged: torch.Tensor) -> int:
    overflowed = ~torch.isfinite(merged)
    if not bool(overflowed.any()):
        return 0
    for elements in block.inputs:
        overflowed &= torch.isfinite(elements)
    return int(torch.count_nonzero(overflowed))


def _count(values: torch.Tensor) -> Counts:
    """How often each value from 0 to 65535 is among int32 ``values``, which are overwritten."""
    # Two bins more, for what lies below and above: cheaper than picking the rest out first.
    counts: Counts = torch.bincount(values.clamp_(-1, _BINS).add_(1), minlength=_BINS + 2)[1:-1].cpu().numpy()
    return counts
