"""How a run of elements gets to what computes and back: whole blocks at a time, in a bounded amount of memory.

:class:`InPlace` hands out the run where it lies. :class:`Conveyor` takes it to a device chunk by chunk through a
few buffers, so that one chunk travels there, one is computed and one travels back at the same time
(:mod:`workers.kernels.moves`). Nothing in here knows CUDA: a device brings its :class:`Lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from workers.canonical import SURVEY_ELEMENTS
from workers.kernels.base import Operands
from workers.kernels.moves import CHUNK_ELEMENTS, MADE, SLOTS, Lane, chunks, device_bytes, moves

Work = Callable[[Operands], torch.Tensor | None]
"""What is done with a chunk; returns its part of the output, if the whole has one."""


def piece(operands: Operands, where: slice) -> Operands:
    """Some of the elements of a run; shares them."""
    return replace(
        operands,
        first=operands.first + where.start,
        base=None if operands.base is None else operands.base[where],
        models=tuple(model[where] for model in operands.models),
        statistics=tuple(statistic[where] for statistic in operands.statistics),
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
    """A :class:`Carrier` for a device with memory of its own, of which it takes at most ``moves.device_bytes``.

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
        base = None if operands.base is None else elements.pop(0)
        models = len(operands.models)
        made = work(
            replace(
                operands,
                first=operands.first + where.start,
                base=base,
                models=tuple(elements[:models]),
                statistics=tuple(elements[models:]),
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
