"""What should not be there: NaN and infinities in inputs, and outputs beyond their dtype's range."""

from __future__ import annotations

from collections.abc import Sequence

from workers.errors import NonFiniteError
from workers.sources import Source, TensorRef
from workers.store.uris import parent
from workers.task import MergePiece


class NonFinite:
    """Counts of them, by tensor and model; true when there are any."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Elements by ``tensor: model``."""
        self._said: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._said)

    def add(self, tensor: str, ref: TensorRef, count: int) -> None:
        """Count NaN or infinities among a model's elements."""
        if count:
            model = parent(ref.uri)
            total = self._add(f"{tensor}: {model}", count)
            self._said[f"{tensor}: {model}"] = f"tensor {tensor!r} of {model} holds {total} NaN or Inf"

    def add_inputs(self, tensor: str, sources: Sequence[Source], counts: Sequence[int]) -> None:
        """Count them in all plain inputs of an arithmetic; a model that is listed twice counts once.

        Those of operands that were made have been counted where they were read.
        """
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            if count and isinstance(source, TensorRef) and source not in sources[:number]:
                self.add(tensor, source, count)

    def add_made(self, tensor: str, dtype: str, count: int) -> None:
        """Count values of an operand that are not finite though all that they were made of is."""
        if count:
            total = self._add(f"{tensor}: operand", count)
            said = f"{total} value(s) of tensor {tensor!r} overflow {dtype} before they are merged"
            self._said[f"{tensor}: operand"] = said

    def add_overflow(self, piece: MergePiece, count: int) -> None:
        """Count outputs that are not finite though all their inputs are."""
        if count:
            key = f"{piece.name}: output"
            total = self._add(key, count)
            self._said[key] = f"{total} merged value(s) of tensor {piece.name!r} overflow {piece.dtype}"

    def error(self) -> NonFiniteError:
        """One error that names everything found."""
        return NonFiniteError("; ".join(self._said.values()) + " (set allow_nonfinite to merge all the same)")

    def _add(self, key: str, count: int) -> int:
        self.counts[key] = self.counts.get(key, 0) + count
        return self.counts[key]
