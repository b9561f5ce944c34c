"""What is done with the chunks of a run on a device, in which order, and the memory that it takes. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from workers.canonical import SURVEY_ELEMENTS

CHUNK_ELEMENTS = 1 << 23
"""Elements that a device is given at a time: enough to keep it busy for longer than its work takes to launch."""

SLOTS = 2
"""Chunks that are on the device at once: one that is computed, one that is on its way there or back."""

MADE = -1
"""In place of a chunk's number: before the first there was the making of the buffers."""

Lane = Literal["send", "compute", "fetch"]
"""What goes on beside each other on a device: copies to it, arithmetic, copies back. Each keeps its own order."""


def chunks(first: int, numel: int, step: int, cuts: Sequence[int] = ()) -> list[slice]:
    """A run of ``numel`` elements from ``first`` on, as pieces of at most ``step``; offsets are from ``first``.

    :param cuts: survey blocks that must be pieces of their own, numbered within the tensor.
    """
    bounds = {*range(0, numel, step), numel}
    bounds |= {(block + side) * SURVEY_ELEMENTS - first for block in cuts for side in (0, 1)}
    inside = sorted(bound for bound in bounds if 0 <= bound <= numel)
    return [slice(start, stop) for start, stop in pairwise(inside)]


@dataclass(frozen=True, slots=True)
class Move:
    """One thing done with one chunk."""

    lane: Lane
    """Where."""
    chunk: int
    """Which."""
    after: tuple[tuple[Lane, int], ...]
    """What must be through before, besides what came before it on its lane: lanes and chunks."""


def moves(count: int, slots: int, fetches: bool) -> Iterator[Move]:
    """All that is done with ``count`` chunks, in the order in which it is asked for.

    A chunk is sent as soon as the one before it in its slot is computed, and computed once it is there, and the
    one before it has left its slot's output. Sending is asked for a chunk ahead, so it goes on while whoever asks is
    held up by a result.

    :param slots: buffers, used in turn: at least 2, or one for each chunk.
    :param fetches: whether there is an output.
    """
    for ahead in range(count + 1):
        if ahead < count:
            yield Move("send", ahead, (("compute", max(ahead - slots, MADE)),))
        chunk = ahead - 1
        if chunk >= 0:
            left: tuple[tuple[Lane, int], ...] = ()
            if fetches and chunk >= slots:
                left = (("fetch", chunk - slots),)
            yield Move("compute", chunk, (("send", chunk), *left))
            if fetches:
                yield Move("fetch", chunk, (("compute", chunk),))


# --- what it takes ----------------------------------------------------------------------------------------

_STEP_WORKSPACE = 40
"""Bytes an element that one step of the arithmetic has, whatever the number of inputs: float64 sums, random words."""

_INPUT_WORKSPACE = 4
"""Bytes an element and input: it in float32, dropped, trimmed and weighted."""

_INPUT_FIXED = 2 << 20
"""Bytes an input, however few its elements are: histograms, and survey blocks filled up with zeros."""

_FIXED = 8 << 20
"""Bytes in any case: a survey block of every statistic, and what an allocator rounds up."""


def device_bytes(
    numel: int, input_widths: Sequence[int], output_width: int, step: int = CHUNK_ELEMENTS
) -> int:
    """Device memory that a pass over a run of ``numel`` elements takes at most, however long the run.

    :param input_widths: bytes an element of every input.
    :param output_width: bytes an element of the output, 0 when there is none.
    :param step: elements of a chunk.
    """
    inputs = len(input_widths)
    slots = SLOTS * (sum(input_widths) + output_width)
    each = slots + _STEP_WORKSPACE + _INPUT_WORKSPACE * inputs
    return min(numel, step) * each + _INPUT_FIXED * inputs + _FIXED
