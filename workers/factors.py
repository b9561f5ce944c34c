"""A piece of an adapter: the two factors of what models add to one weight. Frozen, JSON round-trips, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

from workers.canonical import DTYPE_BYTES
from workers.sources import Change, TensorRef

_WIDE: Final = 8
"""Bytes of a float64, in which factors are computed."""
_STACKED_COPIES: Final = 8
"""Float64 matrices of the factors' sizes that are held at once at most, with LAPACK's workspace."""
_DENSE_COPIES: Final = 12
"""Likewise of the weight's size, where the whole of what is added is decomposed."""


@dataclass(frozen=True, slots=True)
class FactorsPiece:
    """A and B, one after the other, with ``B @ A`` what some models add to one weight, or the nearest to it.

    That is the sum of ``coefficient * (model - base)`` over the models, and of ``scale * (b @ a)`` over the changes.
    """

    kind: Literal["factors"]
    names: tuple[str, str]
    """Names of A and of B in the output."""
    shape: tuple[int, int]
    """``(out, in)``: rows of B and columns of A."""
    rank: int
    """Rows of A and columns of B."""
    dtype: str
    """Safetensors dtype of both."""
    changes: tuple[Change, ...] = ()
    """Factors of adapters, whole; their scales are times the adapter's coefficient. Which way the weight is stored
    makes no difference to them."""
    base: TensorRef | None = None
    """The base model's weight, where there are models."""
    models: tuple[tuple[TensorRef, float], ...] = ()
    """Whole weights, and their coefficients."""
    transposed: bool = False
    """Whether these weights are stored as ``[in, out]``."""

    @property
    def name(self) -> str:
        """What stands for both of them where one name is wanted."""
        return self.names[0]

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """Name and length in bytes of each tensor, in order."""
        width = self.rank * DTYPE_BYTES[self.dtype]
        return (self.names[0], self.shape[1] * width), (self.names[1], self.shape[0] * width)

    @property
    def nbytes(self) -> int:
        """Length in bytes in the output."""
        return sum(nbytes for _, nbytes in self.outputs)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All byte ranges that it reads."""
        factors = chain.from_iterable((change.a, change.b) for change in self.changes)
        weights = () if self.base is None else (self.base, *(ref for ref, _ in self.models))
        return (*weights, *factors)

    def rank_of(self, change: Change) -> int:
        """The rank of one of the changes."""
        return change.a.nbytes // (DTYPE_BYTES[change.a.dtype] * self.shape[1])

    @property
    def is_exact(self) -> bool:
        """Whether the factors are the changes' own, put together: nothing is left out."""
        return not self.models and sum(map(self.rank_of, self.changes)) == self.rank

    @property
    def workspace_bytes(self) -> int:
        """Memory that computing them takes, the inputs and the output not counted."""
        out, into = self.shape
        ranks = sum(map(self.rank_of, self.changes))
        stacked = _STACKED_COPIES * ranks * (out + into + ranks)
        dense = _DENSE_COPIES * out * into if self.models else 0
        return _WIDE * (stacked + dense)
