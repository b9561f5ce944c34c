"""The arithmetic: ``base.py`` says what is computed, ``reference.py`` what it means in torch, ``cpu.py`` does it."""

from __future__ import annotations

from workers.kernels.base import Kernels

__all__ = ["kernels_of"]


def kernels_of(device: str) -> Kernels:
    """What computes on a torch device: compiled kernels on processors, torch elsewhere. The bits are the same."""
    # Imported when chosen: numba is no use to a process that only plans, or computes on a GPU.
    if device == "cpu":
        from workers.kernels.cpu import FusedKernels  # noqa: PLC0415

        return FusedKernels()
    from workers.kernels.torch_kernels import TorchKernels  # noqa: PLC0415

    return TorchKernels(device)
