"""Byte ranges: joining neighbours, so that small tensors cost one request, and placing them in memory. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from workers.arena import ALIGNMENT
from workers.task import DTYPE_BYTES, MERGEABLE_DTYPES, TensorRef

READ_BYTES = 16 << 20
"""Longest range that is asked of S3 in one request, unless its settings say otherwise."""


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous byte range of one object, pinned to its ETag."""

    uri: str
    """The object."""
    etag: str
    """Its ETag."""
    start: int
    """First byte."""
    end: int
    """One past the last byte."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


def coalesce(refs: Iterable[TensorRef]) -> list[Run]:
    """Join ranges of the same object that touch or overlap; nothing is read that nobody asked for.

    >>> a, b, c = (TensorRef("file:///m", "1", start, end, "U8") for start, end in [(0, 4), (4, 6), (7, 9)])
    >>> [(run.start, run.end) for run in coalesce([c, a, b])]
    [(0, 6), (7, 9)]
    """
    runs: list[Run] = []
    for ref in sorted((r for r in refs if r.nbytes), key=lambda r: (r.uri, r.etag, r.start, r.end)):
        last = runs[-1] if runs else None
        if last is not None and (last.uri, last.etag) == (ref.uri, ref.etag) and ref.start <= last.end:
            runs[-1] = Run(last.uri, last.etag, last.start, max(last.end, ref.end))
        else:
            runs.append(Run(ref.uri, ref.etag, ref.start, ref.end))
    return runs


class Arrangement:
    """Where the bytes of some ranges lie in one buffer that begins on a multiple of :data:`ALIGNMENT`.

    Neighbours are joined and read once. The elements of every range of a mergeable dtype are aligned, also those of
    files whose header has an odd length: these are read apart from their neighbours.
    """

    def __init__(self, refs: Iterable[TensorRef]) -> None:
        groups: dict[tuple[int, int], list[TensorRef]] = {}
        for ref in refs:
            groups.setdefault(_shift(ref), []).append(ref)
        self.runs: list[tuple[Run, int]] = []
        """What is read, and where in the buffer it goes."""
        self._runs: dict[tuple[int, int], list[tuple[Run, int]]] = {}
        end = 0
        for shift, group in sorted(groups.items()):
            runs = coalesce(group)
            positions = []
            for run in runs:
                position = end + (run.start - shift[0] - end) % ALIGNMENT
                positions.append(position)
                end = position + run.nbytes
            self._runs[shift] = list(zip(runs, positions, strict=True))
            self.runs += self._runs[shift]
        self.nbytes = end
        """Length of the buffer."""

    @property
    def bytes_read(self) -> int:
        """Bytes of all runs."""
        return sum(run.nbytes for run, _ in self.runs)

    def position(self, ref: TensorRef) -> int:
        """Where in the buffer a range begins.

        :raises LookupError: it was not among ``refs``, nor within one of them.
        """
        if not ref.nbytes:
            return 0
        runs = self._runs.get(_shift(ref), [])
        at = bisect_right(runs, (ref.uri, ref.etag, ref.start), key=_beginning) - 1
        run, position = runs[at] if at >= 0 else (None, 0)
        if run is None or (run.uri, run.etag) != (ref.uri, ref.etag) or ref.end > run.end:
            raise LookupError(f"{ref} is not among the ranges that were arranged")
        return position + ref.start - run.start


def _beginning(placed: tuple[Run, int]) -> tuple[str, str, int]:
    return placed[0].uri, placed[0].etag, placed[0].start


def _shift(ref: TensorRef) -> tuple[int, int]:
    """How many bytes past a multiple of its element's width a range begins, and that width; ``(0, 0)`` if aligned."""
    if ref.dtype not in MERGEABLE_DTYPES:
        return 0, 0
    width = DTYPE_BYTES[ref.dtype]
    return (ref.start % width, width) if ref.start % width else (0, 0)
