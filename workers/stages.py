"""What every task of a worker is: three stages that follow each other, and the memory that it takes for them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from workers.arena import Arena, Extent, padded
from workers.inputs import Inputs
from workers.kernels.base import Kernels, Operands
from workers.nonfinite import NonFinite
from workers.operands import Bench
from workers.sources import Arithmetic
from workers.store.base import ObjectStore
from workers.task import JSONValue
from workers.tracing import span


@dataclass(frozen=True, slots=True)
class Tools:
    """What a worker's tasks share."""

    store: ObjectStore
    """Object storage."""
    arena: Arena
    """Memory for inputs and outputs."""
    kernels: Kernels
    """The arithmetic."""


class Task(ABC):
    """One task on its way. The stages are called in order, each once, and ``release`` at the end in any case."""

    def __init__(self, tools: Tools, inputs: Inputs, output_bytes: int, scratch_bytes: int) -> None:
        self._tools = tools
        self._inputs = inputs
        self._output_bytes = output_bytes
        self._scratch_bytes = scratch_bytes
        self._scratch = memoryview(b"")
        self._extents: list[Extent] = []
        self._problems = NonFinite()
        self._seconds: dict[str, float] = {}

    def read(self) -> None:
        """Wait for room in the arena, for operands that are made too, then fetch the inputs.

        :raises StoreError: reading failed.
        """
        read = self._inputs.nbytes
        self._extents = self._tools.arena.take([self._output_bytes, padded(read) + self._scratch_bytes])
        view = self._extents[-1].view
        self._scratch = view[padded(read) :]
        with self._clock("read"):
            self._inputs.fetch(self._tools.store, view[:read])

    @abstractmethod
    def merge(self) -> None:
        """Compute, and give back what is not needed any more.

        :raises NonFiniteError: an input holds NaN or Inf and the task does not allow it, or an output overflowed.
        """

    @abstractmethod
    def write(self) -> None:
        """Upload what was made.

        :raises StoreError: writing failed.
        """

    @property
    @abstractmethod
    def value(self) -> JSONValue:
        """What is told about the task once it is through."""

    def release(self) -> None:
        """Give back what is still held."""
        self._inputs.release()
        self._scratch = memoryview(b"")
        while self._extents:
            self._tools.arena.give_back(self._extents.pop())

    def _operands(self, arithmetic: Arithmetic, problems: NonFinite) -> Operands:
        """What an arithmetic computes with, until the next is asked for; tells NaN and Inf of what was made of some."""
        return Bench(self._inputs, self._scratch, self._tools.kernels, problems).operands(arithmetic)

    def _refuse_nonfinite(self, allowed: bool) -> None:
        if self._problems and not allowed:
            raise self._problems.error()

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        with span(stage):
            yield
        self._seconds[stage] = round(time.perf_counter() - started, 6)
