"""The memory that tasks work in: one mapping, made once and handed out again and again.

Touching fresh memory costs more than reading a file into it (on a virtual machine up to ten times as much), and
an allocator gives no promise about what it keeps; so a worker has one mapping, of the size that its tasks are
priced with, and every byte that it reads or makes lies in it.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.canonical import PAGE_BYTES

Pin = Callable[[memoryview], Callable[[], None]]
"""Locks memory in its place for the copies of a device, and returns what undoes that."""

ALIGNMENT = PAGE_BYTES
"""Extents begin on a multiple of it: a page, so that files can be written from them directly."""


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`: what an extent of that size occupies."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """A run of an arena's bytes, for one user at a time."""

    view: memoryview
    """The bytes, with whatever their last user left in them."""
    start: int
    """Where in the arena they begin."""


class Arena:
    """So many bytes, handed out first fit. Thread safe."""

    def __init__(self, nbytes: int, pin: Pin | None = None) -> None:
        """
        :param pin: what makes the memory ready for copies to and from a device; undone before it is unmapped.
        """
        self.nbytes = padded(max(1, nbytes))
        """Bytes in all."""
        self._memory = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = self._ready()
        self._pinned = pin is not None
        if pin is not None:
            weakref.finalize(self, pin(self._view))
        self._taken: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def take(self, sizes: Sequence[int]) -> list[Extent]:
        """Extents of these sizes, all at once or not yet: waits until there is room for all of them.

        :raises ValueError: they could never fit.
        """
        if sum(map(padded, sizes)) > self.nbytes:
            raise ValueError(f"{sum(map(padded, sizes))} bytes were asked of an arena of {self.nbytes}")
        with self._changed:
            while (starts := self._fit(sizes)) is None:
                self._changed.wait()
            placed = list(zip(starts, sizes, strict=True))
            self._taken += [(start, padded(size)) for start, size in placed if size]
        return [Extent(self._view[start : start + size], start) for start, size in placed]

    def give_back(self, extent: Extent) -> None:
        """The bytes may be handed out again; nobody may use them any more. Giving back twice is an error."""
        if not len(extent.view):
            return
        with self._changed:
            self._taken.remove((extent.start, padded(len(extent.view))))
            self._changed.notify_all()

    def resize(self, nbytes: int) -> bool:
        """Have ``nbytes`` from now on, in the same memory as far as it goes; whether that could be done.

        Not while an extent is out or somebody still looks into one, and not with pinned memory.
        """
        with self._changed:
            if self._taken or self._pinned:
                return False
            self._view.release()
            size = padded(max(1, nbytes))
            with contextlib.suppress(BufferError, OSError):
                self._memory.resize(size)
                self.nbytes = size
            self._view = self._ready()
            return self.nbytes == size

    def rest(self) -> None:
        """Let the system take the memory if it is short of it; does nothing while an extent is out.

        What it does not take costs nothing to use again, where fresh memory is dear. Pinned memory stays: a page that
        was given up would be another one when it is used again, and a device go on copying to and from the old.
        """
        with self._changed:
            if not self._taken and not self._pinned:
                self._memory.madvise(mmap.MADV_FREE)

    def _ready(self) -> memoryview:
        """The memory, which is to come in huge pages."""
        with contextlib.suppress(OSError):  # a hint, and some kernels do not know it
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._memory)

    def _fit(self, sizes: Sequence[int]) -> list[int] | None:
        taken = sorted(self._taken)
        starts = []
        for size in sizes:
            start = 0
            for at, length in taken:
                if at - start >= padded(size):
                    break
                start = at + length
            if start + padded(size) > self.nbytes:
                return None
            starts.append(start)
            if size:
                taken = sorted([*taken, (start, padded(size))])
        return starts
