"""Byte ranges: joining neighbours, so that small tensors cost one request together. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workers.task import TensorRef

READ_BYTES = 8 << 20
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
