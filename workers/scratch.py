"""How much memory operands take that are made before a method runs: exactly what :mod:`workers.operands` uses. Pure.

Operands of one arithmetic are made one after the other and stay. What is needed to make one of them, such as the
tensors whose mean it is, comes behind it, and is free again when it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

from workers.canonical import DTYPE_BYTES
from workers.sources import Arithmetic, Derived, Gathered, LowRank, RowRun, Source

SCRATCH_ALIGNMENT: Final = 64
"""Every operand that is made begins on a multiple of it within the scratch memory."""


def most_scratch_bytes(arithmetics: Iterable[Arithmetic]) -> int:
    """Scratch memory that it takes to make the operands of each of these, one after the other."""
    return max((scratch_bytes(arithmetic.sources) for arithmetic in arithmetics), default=0)


def scratch_bytes(sources: Iterable[Source]) -> int:
    """Scratch memory that it takes to have all of these at once, with all that is needed to make them one by one."""
    held = most = 0
    for source in sources:
        if not source.is_plain:
            held += aligned_bytes(source.nbytes)
            most = max(most, held + _making_bytes(source))
    return most


def aligned_bytes(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`SCRATCH_ALIGNMENT`: what they take of the scratch memory."""
    return -(-nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


def is_in_place(parts: Sequence[Source], dtype: str) -> bool:
    """Whether elements of ``dtype`` that are made of these are made where they belong: no mean, and not rounded."""
    return len(parts) == 1 and parts[0].dtype == dtype


def inner(source: Source) -> tuple[Arithmetic, ...]:
    """The arithmetics whose outcomes a source is made of, however deep."""
    if isinstance(source, LowRank):
        return inner(source.source)
    if isinstance(source, Gathered):
        return tuple(chain.from_iterable(map(inner, source.sources)))
    if isinstance(source, Derived):
        nested = chain.from_iterable(map(inner, source.arithmetic.sources))
        return (source.arithmetic, *nested)
    return ()


def _making_bytes(source: Source) -> int:
    """Scratch memory beside its own that it takes to make a source."""
    if isinstance(source, LowRank):  # is made where the tensor without adapters was made
        return _making_bytes(source.source)
    if isinstance(source, Derived):
        return scratch_bytes(source.arithmetic.sources)
    if isinstance(source, Gathered) and not all(of.is_plain for of in source.sources):
        is_deep = any(map(_making_bytes, source.sources))
        return max((_taking_bytes(source, run, is_deep) for run in source.runs), default=0)
    return 0


def _taking_bytes(source: Gathered, run: RowRun, is_deep: bool) -> int:
    """Scratch memory beside its own that it takes to make a run of a gathered source.

    :param is_deep: whether a source takes more than its own to make. Where none does, no run is cut out of any.
    """
    parts = source.taken(run) if is_deep else [source.sources[number] for number, _ in run.takes]
    if is_in_place(parts, source.dtype):
        return _making_bytes(parts[0]) if is_deep else 0
    if is_deep:
        return scratch_bytes(parts)
    return sum(aligned_bytes(run.numel * DTYPE_BYTES[of.dtype]) for of in parts if not of.is_plain)
