"""What an arithmetic computes with: ranges where they were read, everything else made of them in scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from workers.binding import bind
from workers.inputs import Inputs
from workers.kernels import kernels_of
from workers.kernels.base import Formula, Found, Kernels, Operands, Term
from workers.kernels.conveyor import piece
from workers.kernels.low_rank import Product, rows_of
from workers.kernels.reference import TORCH_DTYPES
from workers.kernels.torch_kernels import TorchKernels
from workers.nonfinite import NonFinite
from workers.random import mask_key
from workers.scratch import aligned_bytes, is_in_place
from workers.sources import (
    Arithmetic,
    Change,
    Derived,
    Gathered,
    LowRank,
    Source,
    TensorRef,
)
from workers.task import DTYPE_BYTES

_DRAWN_TOGETHER: Final = 4
"""Elements whose random words are drawn together: compiled kernels begin with the first of them."""


class Bench:
    """Scratch memory, and what is made in it: at most :func:`workers.scratch.scratch_bytes` bytes at a time.

    Earlier merges are computed by the kernels that are given, all else on the CPU, whatever the device. NaN and
    infinities that are met on the way are told of the files that hold them.
    """

    def __init__(self, inputs: Inputs, scratch: memoryview, kernels: Kernels, problems: NonFinite) -> None:
        """
        :param inputs: what was read.
        :param scratch: begins on a multiple of ``SCRATCH_ALIGNMENT``.
        :param problems: what is told.
        """
        self._inputs = inputs
        self._scratch = scratch
        self._kernels = kernels
        self._problems = problems
        self._used = 0
        self._name = ""

    def operands(self, arithmetic: Arithmetic) -> Operands:
        """What an arithmetic over one or more elements computes with: shares the bytes, until the next call."""
        self._used = 0
        self._name = arithmetic.name
        return self._operands(arithmetic)

    def _operands(self, arithmetic: Arithmetic) -> Operands:
        keys = (mask_key(arithmetic.seed, model.index, arithmetic.name) for model in arithmetic.models)
        return Operands(
            first=arithmetic.first,
            base=None if arithmetic.base is None else self._tensor(arithmetic.base),
            models=tuple(self._tensor(model.ref) for model in arithmetic.models),
            mask_keys=tuple(keys),
        )

    def _tensor(self, source: Source) -> torch.Tensor:
        """The elements of a source that has some, in its own dtype, shape ``[n]``; they stay where they are."""
        if isinstance(source, TensorRef):
            return self._inputs.tensor(source)
        end = self._used + source.nbytes
        if end > len(self._scratch):
            raise ValueError(
                f"an operand was to end at {end} of {len(self._scratch)} bytes of scratch memory"
            )
        out = self._scratch[self._used : end]
        self._used += aligned_bytes(source.nbytes)
        self._make(source, out)
        return _elements(out, source.dtype)

    def _make(self, source: Source, out: memoryview) -> None:
        """Write the elements of a source that has some; what is held for that is free again afterwards."""
        held = self._used
        if isinstance(source, LowRank):
            self._adapt(source, out)
        elif isinstance(source, Gathered):
            self._gather(source, out)
        elif isinstance(source, Derived):
            self._derive(source, _elements(out, source.dtype))
        else:
            out[:] = self._inputs.view(source)
        self._used = held

    # --- tensors under adapters ---------------------------------------------------------------------------

    def _adapt(self, source: LowRank, out: memoryview) -> None:
        from workers.kernels.cpu_low_rank import add_products  # noqa: PLC0415 - numba, where adapters are

        if is_plain := isinstance(source.source, TensorRef):
            run = self._inputs.tensor(source.source)
        else:
            self._make(source.source, out)
            run = _elements(out, source.dtype)
        before = 0 if is_plain else _nonfinite(run)  # what was made may be overwritten, what was read is not
        columns = source.shape[1]
        above, offset = divmod(source.first, columns)
        rows = rows_of(run.numel(), offset, columns)
        products = [self._product(change, source.shape, above, rows) for change in source.changes]
        made = _elements(out, source.dtype)
        add_products(run, products, offset, columns, made)
        if after := _nonfinite(made):
            read = (*((source.source,) if is_plain else ()), *source.factors)
            if not self._tell_read(read) and not before:
                self._problems.add_made(self._name, source.dtype, after)

    def _product(self, change: Change, shape: tuple[int, int], above: int, rows: int) -> Product:
        """A change's factors for ``rows`` rows of a tensor, from row ``above`` on."""
        rank = change.rank(shape)
        if change.transposed:
            a, b = self._matrix(change.a, rank, shape[0]), self._matrix(change.b, shape[1], rank)
            return Product(a.T[above : above + rows], b.T, change.scale)
        a, b = self._matrix(change.a, rank, shape[1]), self._matrix(change.b, rows, rank)
        return Product(b, a, change.scale)

    def _matrix(self, ref: TensorRef, rows: int, columns: int) -> torch.Tensor:
        if not ref.nbytes:
            return torch.empty((rows, columns), dtype=TORCH_DTYPES[ref.dtype])
        return self._inputs.tensor(ref).view(rows, columns)

    # --- rows from here and there -------------------------------------------------------------------------

    def _gather(self, source: Gathered, out: memoryview) -> None:
        width, dtype, start = DTYPE_BYTES[source.dtype], source.dtype, 0
        copied: list[TensorRef] = []
        for run in source.runs:
            end = start + run.numel * width
            target, parts = out[start:end], source.taken(run)
            start = end
            if not run.numel:
                continue
            if not parts:
                _elements(target, dtype).zero_()
            elif is_in_place(parts, dtype):
                self._make(parts[0], target)
                copied += [part for part in parts if isinstance(part, TensorRef)]
            else:
                self._mean(parts, dtype, _elements(target, dtype))
        if _nonfinite(_elements(out, dtype)):
            self._tell_read(copied)

    def _mean(self, parts: Sequence[Source], dtype: str, out: torch.Tensor) -> None:
        held = self._used
        models = tuple(self._tensor(part) for part in parts)
        terms = tuple(Term(number) for number in range(len(models)))
        divide = float(len(models)) if len(models) > 1 else None
        found = _cpu().merge(Operands(0, None, models, ()), Formula(terms, divide=divide), out)
        self._tell(parts, dtype, found)
        self._used = held

    # --- earlier merges -----------------------------------------------------------------------------------

    def _derive(self, source: Derived, out: torch.Tensor) -> None:
        arithmetic = source.arithmetic
        bound = bind(arithmetic)
        if bound.passes or bound.whole:
            raise ValueError(
                f"{arithmetic.method} of {arithmetic.name} needs its whole tensor: no operand of another"
            )
        formula = bound.formula({})
        whole = self._operands(arithmetic)
        head = min(-arithmetic.first % _DRAWN_TOGETHER, whole.numel)
        for run, kernels in ((slice(0, head), TorchKernels()), (slice(head, whole.numel), self._kernels)):
            if run.start < run.stop:
                found = kernels.merge(piece(whole, run), formula, out[run])
                self._tell(arithmetic.sources, source.dtype, found)

    # --- what should not be there -------------------------------------------------------------------------

    def _tell(self, sources: Sequence[Source], dtype: str, found: Found) -> None:
        """Tell what a computation met in its plain operands, and what it made of finite ones."""
        self._problems.add_inputs(self._name, sources, found.nonfinite)
        self._problems.add_made(self._name, dtype, found.overflowed)

    def _tell_read(self, refs: Sequence[TensorRef]) -> bool:
        """Tell what there is in ranges as they were read; whether there is anything."""
        counts = [_nonfinite(self._inputs.tensor(ref)) if ref.nbytes else 0 for ref in refs]
        self._problems.add_inputs(self._name, refs, counts)
        return any(counts)


def _elements(view: memoryview, dtype: str) -> torch.Tensor:
    """At least one element of these bytes, shape ``[n]``; shares them."""
    return torch.frombuffer(view, dtype=TORCH_DTYPES[dtype])


def _nonfinite(elements: torch.Tensor) -> int:
    (count,) = _cpu().nonfinite(Operands(0, None, (elements,), ()))
    return count


def _cpu() -> Kernels:
    return kernels_of("cpu")
