"""The kernels fused and compiled for processors: each input is read once, a tile at a time, and no temporary is
larger than a tile. The same bits as :class:`workers.kernels.torch_kernels.TorchKernels`, which says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels import cpu_dtypes as dtypes
from workers.kernels import cpu_passes as passes
from workers.kernels import cpu_programs as programs
from workers.kernels import cpu_sums as sums
from workers.kernels import ranks as ranking
from workers.kernels.base import (
    Counts,
    Divisor,
    Formula,
    Found,
    Operands,
    Pairs,
    Sums,
    Term,
    has_task_vectors,
    refuse_cuts,
)
from workers.kernels.cpu_compile import Records, Words
from workers.kernels.cpu_low_rank import add_products
from workers.kernels.low_rank import Product
from workers.kernels.program import Program, Writer
from workers.kernels.reference import float32

_GOLDEN = 0x9E3779B9
"""2**32 over the golden ratio: its multiples are spread evenly, and in no step with anything."""


class FusedKernels:
    """The compiled implementation of :class:`workers.kernels.base.Kernels`, for tensors in main memory.

    It has no state, and may be used by several threads at once; each call keeps one core busy, without the
    interpreter's lock, and takes up to 1.5 MiB of workspace, however long the run.
    """

    def merge(self, operands: Operands, formula: Formula, out: torch.Tensor) -> Found:
        """Write the merged elements to ``out``, and say what was found."""
        election = formula.election
        found = np.zeros(len(operands.inputs) + 1, dtype=np.int64)
        _, *of_run = _run(operands, formula)
        places = _places(*operands.inputs, out)
        finish = (
            formula.divide is not None,
            np.float32(1.0 if formula.divide is None else float32(formula.divide)),
            np.float32(float32(formula.lambda_)),
            found,
        )
        if formula.program is not None:
            program = programs.assemble(formula.program)
            steps = (program.code, program.values, program.slots, int(program.outputs[0]))
            programs.program_merge(places, *of_run, *steps, *finish)
        else:
            zero_sign = 0 if election is None else int(election.zero_sign)
            passes.merge(places, *of_run, zero_sign, *finish)
        *counts, overflowed = found.tolist()
        return Found(tuple(counts), overflowed)

    def nonfinite(self, operands: Operands) -> tuple[int, ...]:
        """NaN and infinities of each input, the base first."""
        found = np.zeros(len(operands.inputs), dtype=np.int64)
        passes.nonfinite(_places(*operands.inputs), operands.numel, found)
        return tuple(found.tolist())

    def histogram(
        self, operands: Operands, formula: Formula, high: Sequence[int] | None, counts: Counts
    ) -> None:
        """Count the high 16 magnitude bits of each term, or the low ones within its bin ``high``, into ``counts``."""
        bins = np.full(len(counts), -1, dtype=np.int64) if high is None else _integers(high)
        if formula.program is None:
            passes.histogram(*_run(operands, formula), bins, counts)
        else:
            program = programs.assemble(formula.program)
            steps = (program.code, program.values, program.slots, program.outputs)
            programs.program_histogram(*_run(operands, formula), *steps, bins, counts)

    def largest(
        self, operands: Operands, formula: Formula, ranks: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Of each term the bits of its ``rank``-th largest magnitude, and how many equal ones make up the rank."""
        places, terms, *run = _run(operands, formula)
        starts = _sample_starts(operands.numel)
        found = []
        for number, rank in enumerate(ranks):
            term = terms[number : number + 1]
            sample = np.empty(min(operands.numel, ranking.SAMPLE), dtype=np.uint32)
            passes.magnitudes(places, term, *run, starts, sample)
            if sample.size == operands.numel:
                found.append(ranking.largest_of(sample, rank))
                continue

            def count(window: ranking.Window, term: Records = term) -> tuple[Words, int]:
                table, above = np.zeros(window.bins, dtype=np.uint32), np.zeros(1, dtype=np.int64)
                passes.window(places, term, *run, window.low, window.shift, table, above)
                return table, int(above[0])

            def count_from(pivots: Words, term: Records = term) -> Counts:
                counts = np.zeros(pivots.size, dtype=np.int64)
                passes.count_from(places, term, *run, pivots, counts)
                return counts

            likely = ranking.bracket(sample, rank, operands.numel)
            found.append(ranking.largest(count, count_from, rank, likely))
        return tuple(found)

    def equal_counts(self, operands: Operands, formula: Formula, thresholds: Sequence[int]) -> Counts:
        """How many elements of each term have the magnitude bits of its threshold: ``[blocks, terms]``."""
        counts = np.zeros((_blocks(operands), len(formula.terms)), dtype=np.int64)
        passes.equal_counts(*_run(operands, formula), _integers(thresholds), counts)
        return counts

    def elected(self, operands: Operands, formula: Formula) -> int:
        """Elements whose terms' weighted sum is above zero, less those where it is below."""
        found = np.zeros(1, dtype=np.int64)
        passes.elected(*_run(operands, formula), found)
        return int(found[0])

    def norms(self, operands: Operands, formula: Formula) -> Sums:
        """L1 norms of each term before its drop and after, unscaled: ``[blocks, terms, 2]``."""
        found = np.empty((_blocks(operands), len(formula.terms), 2), dtype=np.float64)
        sums.norms(*_run(operands, formula), found)
        return found

    def products(self, operands: Operands, formula: Formula, pairs: Pairs) -> Sums:
        """Dot products of pairs of terms, or of outputs of the program: ``[blocks, pairs]``."""
        refuse_cuts(formula)
        program = programs.assemble(formula.program or _terms_alone(len(formula.terms)))
        steps = (program.code, program.values, program.slots)
        slots = program.outputs[np.array(pairs, dtype=np.int64)]
        groups = []
        for first in range(0, len(pairs), sums.PAIRS):
            wanted = np.ascontiguousarray(slots[first : first + sums.PAIRS])
            found = np.empty((_blocks(operands), len(wanted)), dtype=np.float64)
            sums.products(*_run(operands, formula), *steps, wanted, found)
            groups.append(found)
        return np.concatenate(groups, axis=1)


def prepare() -> None:
    """Load every kernel, and compile and keep those that never were here: seconds that a first call would take.

    For a container's build, and for a service before its workers start.
    """
    one = torch.zeros(1)
    operands, formula = Operands(0, one, (one, one), ()), Formula((Term(0),), task_vectors=True)
    kernels = FusedKernels()
    kernels.merge(operands, formula, torch.empty(1))
    kernels.nonfinite(operands)
    kernels.histogram(operands, formula, None, np.zeros((1, passes.BINS), dtype=np.int64))
    kernels.equal_counts(operands, formula, [0])
    equal, different = torch.zeros(ranking.SAMPLE + 1), torch.arange(ranking.SAMPLE + 1.0)
    for model in (equal, different):  # each is counted by a kernel of its own
        kernels.largest(Operands(0, equal, (model,), ()), formula, [1])
    kernels.elected(operands, formula)
    kernels.norms(operands, formula)
    kernels.products(operands, formula, [(0, 0)])
    alone = replace(formula, program=_terms_alone(1))
    kernels.merge(operands, alone, torch.empty(1))
    kernels.histogram(operands, alone, None, np.zeros((1, passes.BINS), dtype=np.int64))
    add_products(one, [Product(one.view(1, 1), one.view(1, 1), 1.0)], 0, 1, torch.empty(1))


def _run(operands: Operands, formula: Formula) -> tuple[Records, Records, int, int, bool]:
    """What every pass over a formula's terms takes first."""
    return (
        _places(*operands.inputs),
        _terms(operands, formula),
        operands.first,
        operands.numel,
        has_task_vectors(operands, formula),
    )


def _terms_alone(terms: int) -> Program:
    """The program whose outputs are the terms."""
    writer = Writer(terms)
    return writer.program(*writer.terms)


def _places(*tensors: torch.Tensor) -> Records:
    """Where the tensors' elements are."""
    numel = tensors[0].numel()
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() != numel:
            raise ValueError("compiled kernels take contiguous tensors of one length, in main memory")
    places = [(tensor.data_ptr(), dtypes.CODES[tensor.dtype], tensor.element_size()) for tensor in tensors]
    return np.array(places, dtype=passes.PLACE)


def _terms(operands: Operands, formula: Formula) -> Records:
    divisor = None if formula.election is None else formula.election.divisor
    shift = len(operands.inputs) - len(operands.models)
    terms = []
    for term in formula.terms:
        drawn = 0 < term.keep_below <= 0xFFFFFFFF
        cut_block, take = (-1, 0) if term.cut is None else term.cut
        terms.append(
            (
                shift + term.model,
                operands.mask_keys[term.model] if drawn else 0,
                term.keep_below,
                term.threshold,
                term.ceiling,
                cut_block,
                take,
                float32(term.factor),
                float32(term.weight),
                float32(_share(term, divisor)),
            )
        )
    return np.array(terms, dtype=passes.TERM)


def _share(term: Term, divisor: Divisor | None) -> float:
    """What a term adds to the divisor where it agrees; of a divisor of zero 1 is made."""
    if divisor is None:
        return 0.0
    return {"abs_weights": abs(term.weight), "count": 1.0, "weights": term.weight}[divisor]


def _integers(values: Sequence[int]) -> Counts:
    return np.array(values, dtype=np.int64)


def _sample_starts(numel: int) -> Counts:
    """Where each piece of a sample begins: everywhere, or one in each of as many equal stretches, not at equal
    distances, which might be a row's length."""
    if numel <= ranking.SAMPLE:
        return np.arange(0, numel, passes.PIECE)
    pieces = ranking.SAMPLE // passes.PIECE
    stretch = numel // pieces // passes.PIECE
    numbers = np.arange(pieces)
    return (numbers * stretch + (numbers * _GOLDEN % (1 << 32) * stretch >> 32)) * passes.PIECE


def _blocks(operands: Operands) -> int:
    return math.ceil(operands.numel / SURVEY_ELEMENTS)
