"""The bytes that one task reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from workers.kernels.base import Operands
from workers.kernels.reference import TORCH_DTYPES
from workers.random import mask_key
from workers.ranges import Arrangement
from workers.store.base import ObjectStore
from workers.task import DTYPE_BYTES, Arithmetic, TensorRef

COPY_BYTES = 1 << 20
"""How much is copied at a time of elements that are not aligned."""

READ_THREADS = 4
"""Ranges read at once; more gain nothing on one worker's share of the network."""


class Inputs:
    """Byte ranges of objects: neighbours joined, each fetched once, straight to where it stays."""

    def __init__(self, refs: Iterable[TensorRef]) -> None:
        self._arrangement = Arrangement(refs)
        self._view = memoryview(b"")

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they need."""
        return self._arrangement.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes to fetch."""
        return self._arrangement.bytes_read

    def fetch(self, store: ObjectStore, view: memoryview) -> None:
        """Read all of them into ``view``: :attr:`nbytes` bytes, beginning on a multiple of ``arena.ALIGNMENT``.

        :raises StoreError: an object cannot be read, has changed, or ends early.
        """
        self._view = view

        def read(index: int) -> None:
            run, position = self._arrangement.runs[index]
            store.read_into(run.uri, run.start, view[position : position + run.nbytes], run.etag)

        count = len(self._arrangement.runs)
        if count == 1:
            read(0)
        elif count:
            with ThreadPoolExecutor(min(READ_THREADS, count), thread_name_prefix="read") as pool:
                list(pool.map(read, range(count)))

    def view(self, ref: TensorRef) -> memoryview:
        """The bytes of one range."""
        position = self._arrangement.position(ref)
        return self._view[position : position + ref.nbytes]

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The elements of one range that is not empty, in its own dtype, shape ``[n]``; shares the bytes."""
        return torch.frombuffer(self.view(ref), dtype=TORCH_DTYPES[ref.dtype])

    def release(self) -> None:
        """Let go of the bytes: whoever asks for them now is wrong."""
        self._view = memoryview(b"")

    def operands(self, arithmetic: Arithmetic) -> Operands:
        """What an arithmetic over one or more elements computes with; shares the bytes."""
        keys = (mask_key(arithmetic.seed, model.index, arithmetic.name) for model in arithmetic.models)
        return Operands(
            first=arithmetic.first,
            base=None if arithmetic.base is None else self.tensor(arithmetic.base),
            models=tuple(self.tensor(model.ref) for model in arithmetic.models),
            mask_keys=tuple(keys),
        )


def aligned(view: memoryview, dtype: str) -> Iterator[torch.Tensor]:
    """The elements of some bytes, in order, of a mergeable dtype: shared, or where they are not aligned, copied."""
    width = DTYPE_BYTES[dtype]
    if not view:
        return
    whole = torch.frombuffer(view, dtype=torch.uint8)
    if whole.data_ptr() % width == 0:
        yield whole.view(TORCH_DTYPES[dtype])
        return
    for start in range(0, len(view), COPY_BYTES):
        yield torch.frombuffer(bytearray(view[start : start + COPY_BYTES]), dtype=TORCH_DTYPES[dtype])
