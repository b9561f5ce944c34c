"""The arithmetic: ``base.py`` says what is computed, ``reference.py`` what it means in torch, ``cpu.py`` does it."""

from __future__ import annotations

from workers.kernels.base import Kernels
from workers.kernels.cpu import FusedKernels
from workers.kernels.torch_kernels import TorchKernels

__all__ = ["kernels_of"]


def kernels_of(device: str) -> Kernels:
    """What computes on a torch device: compiled kernels on processors, torch elsewhere. The bits are the same."""
    return FusedKernels() if device == "cpu" else TorchKernels(device)
