"""What tasks are called in errors and logs: by their tensors, for people."""

from __future__ import annotations

from collections.abc import Iterable

from workers.task import HeaderPiece, Part


def part_label(part: Part) -> str:
    """A part's tensors, for people: ``model.norm.weight and 3 more``."""
    names = [piece.name for piece in part.pieces if not isinstance(piece, HeaderPiece)]
    return label_of(names) if names else f"header of {part.shard}"


def label_of(names: Iterable[str]) -> str:
    """One or more tensors, for people."""
    first, *others = dict.fromkeys(names)
    return f"{first} and {len(others)} more" if others else first
