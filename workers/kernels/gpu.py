"""All that knows CUDA: streams and events in the place of :class:`workers.kernels.conveyor.Lanes`, pinned memory.

Nothing in here has run yet: there was no GPU. It was written from the documentation of CUDA's runtime and of
``torch.cuda``, and kept so small for that reason; what it is called by is tested without a GPU. Where there is
one, ``tests/workers/kernels/test_gpu.py`` and ``python -m benchmarks.gpu`` say whether it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from workers.errors import FleetError
from workers.kernels.conveyor import Lanes
from workers.kernels.moves import Lane

log = logging.getLogger(__name__)

_PORTABLE = 1
"""``cudaHostRegisterPortable``: pinned for every context of the process."""


class CudaLanes(Lanes):
    """A stream a lane: two of their own for the copies, and for arithmetic the one that the caller is on.

    No tensor needs ``record_stream``. The buffers that several streams use are made at the beginning of a run of
    moves, which first waits for that, and go after :meth:`join`, when no stream has anything left to do; what else
    is allocated is used on the caller's stream alone, where the caching allocator keeps order by itself.

    The copy streams do not wait for the default stream of CUDA (torch makes its streams non-blocking), so they
    run beside it. For one thread at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._send = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fetch = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._reserved = 0

    def reserve(self, nbytes: int) -> None:
        """Have that much cached in one piece.

        The allocator then takes every tensor from this piece, and joins what is freed again. Otherwise it would keep
        a piece for every size that was ever asked for, which over tensors of many sizes adds up to more than any
        of them needs.
        """
        if nbytes <= self._reserved:
            return
        torch.cuda.empty_cache()
        self._reserved = nbytes
        torch.empty(
            nbytes, dtype=torch.uint8, device=self._device
        )  # freed at once, and kept by the allocator

    def run(self, lane: Lane, work: Callable[[], None], after: Sequence[object] = ()) -> torch.cuda.Event:
        """See :meth:`Lanes.run`; work that reads a result waits for it, and holds up the caller."""
        stream = self._stream(lane)
        for event in after:
            if not isinstance(event, torch.cuda.Event):
                raise TypeError(f"{event!r} is not what a lane returned")
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            work()
            end: torch.cuda.Event = stream.record_event()
        return end

    def join(self) -> None:
        """See :meth:`Lanes.join`."""
        for stream in (self._send, self._stream("compute"), self._fetch):
            stream.synchronize()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane == "compute":
            return torch.cuda.current_stream(self._device)
        return self._send if lane == "send" else self._fetch


def pin(device: torch.device, memory: memoryview) -> Callable[[], None]:
    """Lock memory in its place, so that copies between it and a device go on by themselves; returns what undoes it.

    Copies of memory that is not pinned pass through a buffer of the driver's, at a fraction of the speed, and hold
    up whoever asks for them. What undoes it keeps the memory mapped, and is to be called once, when no
    copy is on its way.

    :raises FleetError: the driver refused.
    """
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        refused = int(runtime.cudaHostRegister(whole.data_ptr(), whole.numel(), _PORTABLE))
    if refused:
        raise FleetError(
            f"CUDA would not pin {whole.numel()} bytes of main memory (error {refused}); "
            "set MERGEMILL_GPU_MEMORY_BYTES=0 to compute on CPUs"
        )

    def unpin() -> None:
        with torch.cuda.device(device):
            refused = int(runtime.cudaHostUnregister(whole.data_ptr()))
        if refused:
            log.warning("CUDA would not let go of %d pinned bytes (error %d)", whole.numel(), refused)

    return unpin
