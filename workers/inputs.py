"""The bytes that one task reads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from workers.errors import CorruptReadError
from workers.kernels.reference import TORCH_DTYPES
from workers.ranges import Arrangement
from workers.store.base import ObjectStore
from workers.store.retries import RETRIES
from workers.task import BLOCK_BYTES, DTYPE_BYTES, TensorRef

COPY_BYTES = 1 << 20
"""How much is copied at a time of elements that are not aligned."""

READ_THREADS = 4
"""Ranges read at once; more gain nothing on one worker's share of the network."""

SHORT_BYTES = 256 << 10
"""A range below it is waited for rather than read: rows of an embedding that were gathered, or tiny tensors."""

SHORT_READ_THREADS = 16
"""Ranges read at once where most are short."""


Known = Mapping[tuple[str, int, int], bytes]
"""The SHA-256 of each block of ranges, one after the other, by URI, start and end."""

_NOTHING: Final[Known] = {}
_DIGEST_BYTES: Final = 32

log = logging.getLogger(__name__)


class Inputs:
    """Byte ranges of objects: neighbours joined, each fetched once, straight to where it stays."""

    def __init__(self, refs: Iterable[TensorRef], known: Known = _NOTHING) -> None:
        """
        :param known: digests of some of the ranges; these are checked as soon as they have been read.
        """
        refs = tuple(refs)
        self._arrangement = Arrangement(refs)
        of = {(ref.uri, ref.start, ref.end): ref for ref in refs} if known else {}
        self._known = [(ref, known[where]) for where, ref in of.items() if where in known]
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

        :raises StoreError: an object cannot be read, has changed, ends early, or has other bytes than are known.
        """
        self._view = view

        def read(index: int) -> None:
            run, position = self._arrangement.runs[index]
            store.read_into(run.uri, run.start, view[position : position + run.nbytes], run.etag or None)

        count = len(self._arrangement.runs)
        if count == 1:
            read(0)
        elif count:
            short = sum(run.nbytes < SHORT_BYTES for run, _ in self._arrangement.runs)
            threads = SHORT_READ_THREADS if 2 * short > count else READ_THREADS
            with ThreadPoolExecutor(min(threads, count), thread_name_prefix="read") as pool:
                list(pool.map(read, range(count)))
        for ref, digests in self._known:
            self._check(store, ref, digests)

    def _check(self, store: ObjectStore, ref: TensorRef, digests: bytes) -> None:
        view = self.view(ref)
        for number, start in enumerate(range(0, len(view), BLOCK_BYTES)):
            block = view[start : start + BLOCK_BYTES]
            wanted = digests[_DIGEST_BYTES * number : _DIGEST_BYTES * (number + 1)]
            if hashlib.sha256(block).digest() == wanted:
                continue
            begin = ref.start + start
            where = f"bytes {begin} to {begin + len(block)} of {ref.uri}"
            log.warning("%s do not have their SHA-256; reading them again", where)
            RETRIES.add("checksum")
            store.read_into(ref.uri, begin, block, ref.etag or None)
            if hashlib.sha256(block).digest() != wanted:
                raise CorruptReadError(
                    f"{where} do not have the SHA-256 that the mergemill.json beside it tells, read twice: they change "
                    "on the way here, or did before they were stored. Fetch or make this model anew; to take it as it "
                    "is, delete that mergemill.json"
                )

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
