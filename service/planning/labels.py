"""What tasks are called in errors and logs: by their tensors, for people."""

from __future__ import annotations

from collections.abc import Iterable

from workers.task import HeaderPiece, Part

MOST_NAMED = 512
"""As many tensors are named where it may be any of them."""


def part_label(part: Part) -> str:
    """A part's tensors, for people: ``model.norm.weight and 3 more``."""
    names = _names(part)
    return label_of(names) if names else f"header of {part.shard}"


def suspects(part: Part, said: str) -> str:
    """Where several tensors may be what a worker died of, and ``said`` does not tell which: the others, by name."""
    others = _names(part)[1:]
    if not others or any(name in said for name in others) or "the tensor " in said:
        return ""
    shown = ", ".join(others[:MOST_NAMED])
    more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    return f"; with it were {shown}{more}"


def _names(part: Part) -> list[str]:
    return list(dict.fromkeys(piece.name for piece in part.pieces if not isinstance(piece, HeaderPiece)))


def label_of(names: Iterable[str]) -> str:
    """One or more tensors, for people."""
    first, *others = dict.fromkeys(names)
    return f"{first} and {len(others)} more" if others else first
