"""JSON from strangers, bounded before it is read: a byte of text can become thirty of objects. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 64
"""Deepest nesting of what is written out again: writing recurses, and that would fail after all the work is done."""


def most_values(text: bytes) -> int:
    """At least as many as there are values in a JSON text; found without reading it."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def load(text: bytes, limit: int, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A document of at most ``limit`` values, no deeper than :data:`MAX_DEPTH`, that can be written again.

    :param object_of: makes an object of its keys and values, in their order; where it is not given the last of equal
        keys wins.
    :raises ValueError: it is not, or is not JSON.
    """
    if (count := most_values(text)) > limit:
        raise ValueError(f"it holds up to {count} values, more than the {limit} that are read")
    try:
        document = json.loads(text, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _within(value)]
        if not level:
            return document
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _within(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is a ValueError
    return []
