"""The arithmetic: ``base.py`` says what is computed, ``reference.py`` what it means in torch, ``cpu.py`` does it.

On a device ``torch_kernels.py`` does it, to which ``conveyor.py`` brings the elements, by means of ``gpu.py``.
"""

from __future__ import annotations

from functools import partial

from workers.arena import Pin
from workers.kernels.base import Kernels

__all__ = ["kernels_of", "pin_of"]

# Modules are imported when they are chosen: torch is no use to a process that only plans, and numba none to one that
# computes on a GPU.


def kernels_of(device: str) -> Kernels:
    """What computes on a torch device: compiled kernels on processors, torch elsewhere. The bits are the same."""
    if device == "cpu":
        from workers.kernels.cpu import FusedKernels  # noqa: PLC0415

        return FusedKernels()
    import torch  # noqa: PLC0415

    from workers.kernels.conveyor import Conveyor  # noqa: PLC0415
    from workers.kernels.gpu import CudaLanes  # noqa: PLC0415
    from workers.kernels.torch_kernels import TorchKernels  # noqa: PLC0415

    where = torch.device(device)
    return TorchKernels(Conveyor(where, CudaLanes(where)))


def pin_of(device: str) -> Pin | None:
    """What makes memory ready for copies to and from a torch device; ``None`` where nothing is copied."""
    if device == "cpu":
        return None
    import torch  # noqa: PLC0415

    from workers.kernels.gpu import pin  # noqa: PLC0415

    return partial(pin, torch.device(device))
