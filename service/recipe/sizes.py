"""How much a recipe lists in all, before any of it is looked into: by YAML's aliases a short text may stand for very
much, and every list of it may be within its own limit. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from workers.errors import RecipeError

MAX_ENTRIES = 1 << 14
"""Most models, slices, modules and tokens of a recipe, all its lists and documents together, and these themselves."""

MAX_SETTINGS = 1 << 18
"""Most values of all its parameters."""


def check_sizes(documents: Iterable[Any]) -> None:
    """Refuse a recipe of these documents that lists more than is read; whatever else is wrong with it is let be.

    :raises RecipeError: it does.
    """
    entries = settings = 0
    for document in documents:
        for entry in _entries(document):
            entries += 1
            if entries > MAX_ENTRIES:
                raise RecipeError(
                    f"the recipe lists more than the {MAX_ENTRIES} models, slices and tokens that are read"
                )
            for setting in _within(entry, "parameters"):
                settings += _values(setting)
                if settings > MAX_SETTINGS:
                    raise RecipeError(f"parameters: more than the {MAX_SETTINGS} values in all that are read")


def _entries(document: Any) -> Iterator[Any]:
    """Everything that has parameters, or is one of many: the document and its modules, slices, models and tokens."""
    tokenizer = document.get("tokenizer") if isinstance(document, Mapping) else None
    yield from _within(tokenizer, "tokens")
    for holder in (document, *_within(document, "modules")):
        yield holder
        yield from _within(holder, "models")
        for part in _within(holder, "slices"):
            yield part
            yield from _within(part, "sources")


def _within(holder: Any, key: str) -> Iterable[Any]:
    """What a list, or a mapping, of this name holds."""
    held = holder.get(key) if isinstance(holder, Mapping) else None
    return held.values() if isinstance(held, Mapping) else held if isinstance(held, list | tuple) else ()


def _values(setting: Any) -> int:
    """How many values a parameter has, in all conditions and gradients."""
    return sum(map(_length, setting)) if isinstance(setting, list | tuple) else _length(setting)


def _length(condition: Any) -> int:
    value = condition.get("value") if isinstance(condition, Mapping) else None
    return max(1, len(value)) if isinstance(value, list | tuple) else 1
