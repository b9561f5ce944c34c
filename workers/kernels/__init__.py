"""The arithmetic itself: ``base.py`` says what is computed, ``reference.py`` in torch is the meaning."""

from __future__ import annotations

from workers.kernels.base import Kernels
from workers.kernels.torch_kernels import TorchKernels

__all__ = ["kernels_of"]


def kernels_of(device: str) -> Kernels:
    """What computes on a torch device."""
    return TorchKernels(device)
