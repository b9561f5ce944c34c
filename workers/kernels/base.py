"""What kernels compute, said as data: one generalised task arithmetic, and the statistics that it needs.

Every merge method is a :class:`Formula` once its survey is done. Two implementations give the same bits for it:
:mod:`workers.kernels.torch_kernels` (on any device: the meaning) and :mod:`workers.kernels.cpu` (fused and
compiled). Inputs come in their own dtypes; all arithmetic is float32, one operation at a time, in the order
written here, and is rounded to the output dtype once.

An element of a term is made in these steps: widen to float32; subtract the base's (``task_vectors``); drop and
rescale; trim from above and from below; multiply by the weight. An element of the output is the terms' sum, in order,
their elected consensus, or what a small program makes of them; over the divisor; times lambda; plus the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from workers.kernels.program import Program

if TYPE_CHECKING:  # whoever only plans needs no torch
    import torch

Divisor = Literal["abs_weights", "count", "weights"]
"""What a consensus is divided by, over the models that agree: their absolute weights, number or weights."""

KEEP_ALL = 1 << 32
"""The bound above every 32-bit random word: nothing is dropped."""

NO_CEILING = 0x7F800001
"""The ceiling above every number's magnitude bits: nothing is too large."""

DROP_NUMBERS = 0x7F800001
"""The threshold above every number's magnitude bits, infinity's included: only NaN is left."""

Pairs = Sequence[tuple[int, int]]

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Operands:
    """A run of elements of one tensor, from every input: flat tensors of equal length, in main memory.

    Each is float32, bfloat16 or float16 (contiguous, aligned to its element) and may differ from the others.
    """

    first: int
    """Flat index, within the tensor, of the first element: a multiple of ``SURVEY_ELEMENTS``."""
    base: torch.Tensor | None
    """The base model's elements, shape ``[n]``; ``None`` for methods without a base."""
    models: tuple[torch.Tensor, ...]
    """The models' elements, each of shape ``[n]``, in the recipe's order."""
    mask_keys: tuple[int, ...]
    """A 64-bit Philox key per model, from seed, model index and tensor name; may be empty when nothing is dropped."""
    statistics: tuple[torch.Tensor, ...] = ()
    """One more input for each model, where the method takes one (a diagonal Fisher), in the same order; else empty."""

    @property
    def numel(self) -> int:
        """Elements of each."""
        return self.models[0].numel()

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """All of them: the base first, where there is one, then the models, then their statistics."""
        models = (*self.models, *self.statistics)
        return models if self.base is None else (self.base, *models)


@dataclass(frozen=True, slots=True)
class Term:
    """One model's share of a formula."""

    model: int
    """Which of the operands' models."""
    weight: float = 1.0
    """What it is multiplied by, once rounded to float32."""
    keep_below: int = KEEP_ALL
    """Elements whose 32-bit Philox word is below this are kept, the others become +0.0 (NaN stays NaN)."""
    factor: float = 1.0
    """What the kept ones are multiplied by, once rounded to float32; not applied under ``KEEP_ALL``."""
    threshold: int = 0
    """Elements with magnitude bits below this become +0.0; NaN's are above every number's."""
    cut: tuple[int, int] | None = None
    """``(block, take)``: of the elements equal to the threshold, those of earlier survey blocks stay, of this block
    the first ``take``, of later blocks none. ``None``: all stay."""
    ceiling: int = NO_CEILING
    """Numbers with magnitude bits from this on become +0.0; NaN stays."""
    statistic: bool = False
    """Whether it is the model's statistic: never a difference to the base, and only read by a program."""

    def trim_of(self, block: int) -> tuple[int, int | None]:
        """The threshold within a survey block, and how many elements equal to it stay (``None``: all)."""
        if self.cut is None or block < self.cut[0]:
            return self.threshold, None
        return (self.threshold, self.cut[1]) if block == self.cut[0] else (self.threshold + 1, None)


@dataclass(frozen=True, slots=True)
class Election:
    """TIES' second and third step (2306.01708): elect a sign an element, merge the terms that have it."""

    zero_sign: Literal[1, -1] = 1
    """The sign elected where the weighted sum is exactly zero."""
    divisor: Divisor | None = None
    """What the sum of the agreeing terms is divided by, 1 where that is zero; ``None``: nothing."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A merge of one tensor, its survey done."""

    terms: tuple[Term, ...]
    """The models that take part, in the order of summation; at least one."""
    task_vectors: bool | None = False
    """Whether terms are differences to the base, which is added back at the end; ``None``: where there is a base."""
    election: Election | None = None
    """Merge by elected signs; ``None``: add the terms up."""
    divide: float | None = None
    """What the sum is divided by, once rounded to float32; ``None``: nothing."""
    lambda_: float = 1.0
    """What the result is multiplied by, once rounded to float32, before the base is added."""
    program: Program | None = None
    """Merge by what its one output is; ``None``: by election or sum."""

    def __post_init__(self) -> None:
        if self.program is None and any(term.statistic for term in self.terms):
            raise ValueError("a model's statistic is read by programs, and neither added up nor elected")


PAIR = Formula((Term(0), Term(1)))
"""Two models as they are."""

PAIRS = ((0, 0), (1, 1), (0, 1))
"""Both squared norms and the dot product of two rows."""


def has_task_vectors(operands: Operands, formula: Formula) -> bool:
    """Whether the formula's terms are differences to the base."""
    if formula.task_vectors and operands.base is None:
        raise ValueError("task vectors need the base model's elements")
    return formula.task_vectors is not False and operands.base is not None


def refuse_cuts(formula: Formula) -> None:
    """A statistic that does not take elements in order has no place for a cut."""
    if any(term.cut is not None for term in formula.terms):
        raise ValueError("products take terms without a cut")


@dataclass(frozen=True, slots=True)
class Found:
    """What a merge met that should not be there."""

    nonfinite: tuple[int, ...]
    """NaN and infinities of each of the operands' inputs, the base first."""
    overflowed: int
    """Outputs that are not finite though all inputs of theirs are."""


class Kernels(Protocol):
    """The interface of both implementations. Statistics read NaN and infinities as zero.

    A formula given to a statistic has just the terms that it is wanted of. A run may be of any length; per-block
    results are on the grid of ``SURVEY_ELEMENTS``, the last block maybe short.
    """

    def merge(self, operands: Operands, formula: Formula, out: torch.Tensor) -> Found:
        """Write the merged elements to ``out``: shape ``[n]``, float32, bfloat16 or float16, rounded once to nearest
        even, NaN as 0x7FC00000, 0x7FC0 or 0x7E00."""

    def nonfinite(self, operands: Operands) -> tuple[int, ...]:
        """NaN and infinities of each input, the base first."""

    def histogram(
        self, operands: Operands, formula: Formula, high: Sequence[int] | None, counts: Counts
    ) -> None:
        """Count magnitude bits of each term (untrimmed, unweighted), and add to ``counts``, shape ``[terms, 65536]``.

        With ``high`` of ``None`` their high 16 bits are counted; else, of the elements whose high bits are
        ``high[term]``, the low 16 bits. Where the formula has a program, its outputs are counted in place of terms.
        """

    def largest(
        self, operands: Operands, formula: Formula, ranks: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Of each term (untrimmed, unweighted): the magnitude bits of the ``rank``-th largest element, from 1, and how
        many of the elements that have these bits are among the ``rank`` largest. The run is the whole tensor."""

    def equal_counts(self, operands: Operands, formula: Formula, thresholds: Sequence[int]) -> Counts:
        """How many elements of each term (untrimmed, unweighted) have these magnitude bits: ``[blocks, terms]``."""

    def elected(self, operands: Operands, formula: Formula) -> int:
        """Elements whose terms' weighted sum is above zero, less those where it is below."""

    def norms(self, operands: Operands, formula: Formula) -> Sums:
        """L1 norms of each term's elements before they are dropped and after, unscaled and untrimmed: shape
        ``[blocks, terms, 2]``, float64, each block summed by the fixed tree of ``reference.block_sums``."""

    def products(self, operands: Operands, formula: Formula, pairs: Pairs) -> Sums:
        """Dot products of pairs of terms (trimmed, weighted), or of outputs of the formula's program, which sees NaN
        and infinities among its terms as zero: shape ``[blocks, pairs]``, float64, by the same tree. A pair is two
        numbers of terms or outputs. No term has a cut: the tree does not take elements in order.
        """
