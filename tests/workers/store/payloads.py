"""Bytes to put into stores."""

from __future__ import annotations

MIB = 1 << 20


def filled(size: int, seed: int = 0) -> bytes:
    """``size`` bytes in which no two blocks are alike."""
    block = b"".join(((i * 2654435761 + seed * 97) & 0xFFFFFFFF).to_bytes(4, "big") for i in range(1 << 14))
    return b"".join((i + seed).to_bytes(8, "big") + block[8:] for i in range(-(-size // len(block))))[:size]
