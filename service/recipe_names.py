"""The names of models in a recipe's data, wherever they are written; apart, since it needs nothing but Python. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def with_names(data: Mapping[str, Any], rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A recipe's data with every model in it called what ``rename`` says, given its place and its name."""
    changed = dict(data)
    for field in ("base_model", "tokenizer_source", "buffers"):
        keyword = field == "tokenizer_source" and changed.get(field) in ("base", "union")
        if changed.get(field) is not None and not keyword:
            changed[field] = rename(field, changed[field])
    return _lists_renamed(changed, "", rename)


def _lists_renamed(data: dict[str, Any], path: str, rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    """As :func:`with_names`, for the lists of a recipe, a module or a slice."""
    for field in ("models", "slices", "sources"):
        if isinstance(entries := data.get(field), list):
            data[field] = [
                _entry_renamed(dict(entry), f"{path}{field}[{index}].", rename)
                if isinstance(entry, dict)
                else entry
                for index, entry in enumerate(entries)
            ]
    if isinstance(modules := data.get("modules"), dict):
        data["modules"] = {
            name: _lists_renamed(dict(module), f"{path}modules.{name}.", rename)
            if isinstance(module, dict)
            else module
            for name, module in modules.items()
        }
    return data


def _entry_renamed(entry: dict[str, Any], path: str, rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    for field in ("model", "base_model", "fisher", "gram"):
        if entry.get(field) is not None:
            entry[field] = rename(f"{path}{field}", entry[field])
    return _lists_renamed(entry, path, rename)
