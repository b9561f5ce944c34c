"""How a run of elements gets to what computes and back: whole blocks at a time, in a bounded amount of memory.

:class:`InPlace` hands out the run where it lies. :class:`Conveyor` takes it to a device chunk by chunk through a
few buffers, so that one chunk travels there, one is computed and one travels back at the same time. Which of
that waits for which is :func:`moves`, and nothing in here knows CUDA: a device brings its :class:`Lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, Protocol

import torch

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels.base import Operands

CHUNK_ELEMENTS = 1 << 23
"""Elements that a device is given at a time: enough to keep it busy for longer than its work takes to launch."""

SLOTS = 2
"""Chunks that are on the device at once: one that is computed, one that is on its way there or back."""

MADE = -1
"""In place of a chunk's number: before the first there was the making of the buffers."""

Work = Callable[[Operands], torch.Tensor | None]
"""What is done with a chunk; returns its part of the output, if the whole has one."""


def chunks(first: int, numel: int, step: int, cuts: Sequence[int] = ()) -> list[slice]:
    """A run of ``numel`` elements from ``first`` on, as pieces of at most ``step``; offsets are from ``first``.

    :param cuts: survey blocks that must be pieces of their own, numbered within the tensor.
    """
    bounds = {*range(0, numel, step), numel}
    bounds |= {(block + side) * SURVEY_ELEMENTS - first for block in cuts for side in (0, 1)}
    inside = sorted(bound for bound in bounds if 0 <= bound <= numel)
    return [slice(start, stop) for start, stop in pairwise(inside)]


def piece(operands: Operands, where: slice) -> Operands:
    """Some of the elements of a run; shares them."""
    return replace(
        operands,
        first=operands.first + where.start,
        base=None if operands.base is None else operands.base[where],
        models=tuple(model[where] for model in operands.models),
    )


class Carrier(Protocol):
    """What brings elements to where they are computed with."""

    device: torch.device
    """Where that is."""

    def carry(
        self,
        operands: Operands,
        work: Work,
        out: torch.Tensor | None = None,
        cuts: Sequence[int] = (),
    ) -> None:
        """Do the work on all of a run, in order; when this returns it is done, and ``out`` is written.

        :param operands: in main memory, which nobody changes meanwhile.
        :param out: what the work returns goes there, in main memory, shape ``[n]``; ``None`` when it returns nothing.
        :param cuts: survey blocks that are worked on by themselves.
        """


class InPlace:
    """A :class:`Carrier` for the processor: nothing moves."""

    def __init__(self, step: int = SURVEY_ELEMENTS) -> None:
        """
        :param step: elements worked on at a time, a multiple of ``SURVEY_ELEMENTS``.
        """
        self.device = torch.device("cpu")
        self._step = _whole_blocks(step)

    def carry(
        self,
        operands: Operands,
        work: Work,
        out: torch.Tensor | None = None,
        cuts: Sequence[int] = (),
    ) -> None:
        """See :meth:`Carrier.carry`."""
        for where in chunks(operands.first, operands.numel, self._step, cuts):
            made = work(piece(operands, where))
            if out is not None and made is not None:
                out[where] = made


# --- to a device and back ---------------------------------------------------------------------------------

Lane = Literal["send", "compute", "fetch"]
"""What goes on beside each other on a device: copies to it, arithmetic, copies back. Each keeps its own order."""


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


class Lanes:
    """The lanes of a device that does everything at once and in order, as a processor does; CUDA's are its own.

    What :meth:`run` returns stands for the end of that work, and is only ever given to ``after``.
    """

    def reserve(self, nbytes: int) -> None:
        """Be told how much memory the work from here to :meth:`join` takes at most."""

    def run(self, lane: Lane, work: Callable[[], None], after: Sequence[object] = ()) -> object:
        """Do some work on a lane, behind what it has and behind ``after``; may return before it is done."""
        work()
        return None

    def join(self) -> None:
        """Wait until everything is done."""


class Conveyor:
    """A :class:`Carrier` for a device with memory of its own, of which it takes at most :func:`device_bytes`.

    Nothing stays on the device between two calls: a method with several passes over the same elements sends them
    as often. Who computes with it must make everything that outlives a chunk's work on the lane ``compute``'s
    stream, that of the caller.
    """

    def __init__(self, device: torch.device, lanes: Lanes, step: int = CHUNK_ELEMENTS) -> None:
        """
        :param step: elements of a chunk, a multiple of ``SURVEY_ELEMENTS``.
        """
        self.device = device
        self._lanes = lanes
        self._step = _whole_blocks(step)

    def carry(
        self,
        operands: Operands,
        work: Work,
        out: torch.Tensor | None = None,
        cuts: Sequence[int] = (),
    ) -> None:
        """See :meth:`Carrier.carry`."""
        lanes, pieces = self._lanes, chunks(operands.first, operands.numel, self._step, cuts)
        if not pieces:
            return
        widths = [elements.element_size() for elements in operands.inputs]
        width = 0 if out is None else out.element_size()
        lanes.reserve(device_bytes(operands.numel, widths, width, self._step))
        longest = max(where.stop - where.start for where in pieces)
        slots: list[_Slot] = []

        def make() -> None:
            for _ in range(min(SLOTS, len(pieces))):
                slots.append(_Slot(operands, out, longest, self.device))

        def send(chunk: int) -> None:
            slots[chunk % len(slots)].send(piece(operands, pieces[chunk]))

        def compute(chunk: int) -> None:
            slots[chunk % len(slots)].compute(work, operands, pieces[chunk])

        def fetch(chunk: int) -> None:
            if out is not None:
                slots[chunk % len(slots)].fetch(out[pieces[chunk]])

        does: dict[Lane, Callable[[int], None]] = {"send": send, "compute": compute, "fetch": fetch}
        try:
            ends = {("compute", MADE): lanes.run("compute", make)}
            for move in moves(len(pieces), min(SLOTS, len(pieces)), out is not None):
                after = [ends[end] for end in move.after]
                ends[move.lane, move.chunk] = lanes.run(
                    move.lane, partial(does[move.lane], move.chunk), after
                )
        finally:
            lanes.join()  # before the buffers go, and before the caller's memory is another's


class _Slot:
    """Room for one chunk on a device: its inputs, and what is made of them."""

    def __init__(
        self, operands: Operands, out: torch.Tensor | None, numel: int, device: torch.device
    ) -> None:
        self._inputs = [torch.empty(numel, dtype=x.dtype, device=device) for x in operands.inputs]
        self._output = None if out is None else torch.empty(numel, dtype=out.dtype, device=device)

    def send(self, chunk: Operands) -> None:
        for room, elements in zip(self._inputs, chunk.inputs, strict=True):
            room[: chunk.numel].copy_(elements, non_blocking=True)

    def compute(self, work: Work, operands: Operands, where: slice) -> None:
        numel = where.stop - where.start
        elements = [room[:numel] for room in self._inputs]
        made = work(
            replace(
                operands,
                first=operands.first + where.start,
                base=None if operands.base is None else elements.pop(0),
                models=tuple(elements),
            )
        )
        if made is not None and self._output is not None:
            # A copy within the device: what is fetched then lies where nothing is allocated in the meantime.
            self._output[:numel].copy_(made)

    def fetch(self, out: torch.Tensor) -> None:
        if self._output is not None:
            out.copy_(self._output[: out.numel()], non_blocking=True)


def _whole_blocks(step: int) -> int:
    if step < 1 or step % SURVEY_ELEMENTS:
        raise ValueError(f"{step} elements at a time are not a multiple of {SURVEY_ELEMENTS}")
    return step


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
