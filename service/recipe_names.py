"""The names of models in a recipe's data, wherever they are written; apart, since it needs nothing but Python. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

DOCUMENTS: Final = "documents"
"""The key of a recipe's documents, where it has several."""


def with_names(data: Mapping[str, Any], rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A recipe's data with every model in it called what ``rename`` says, given its place and its name.

    Of several documents the names of the merges themselves stay.
    """
    documents = data.get(DOCUMENTS)
    if not isinstance(documents, list):
        return _document_renamed(data, "", rename)
    stages = [each.get("name") for each in documents if isinstance(each, dict)]

    def rename_model(place: str, name: Any) -> Any:
        return name if name in stages else rename(place, name)

    renamed = [
        _document_renamed(each, f"{DOCUMENTS}[{index}].", rename_model) if isinstance(each, dict) else each
        for index, each in enumerate(documents)
    ]
    return {**data, DOCUMENTS: renamed}


def _document_renamed(
    data: Mapping[str, Any], path: str, rename: Callable[[str, Any], Any]
) -> dict[str, Any]:
    changed = dict(data)
    for field in ("base_model", "tokenizer_source", "buffers"):
        keyword = field == "tokenizer_source" and changed.get(field) in ("base", "union")
        if changed.get(field) is not None and not keyword:
            changed[field] = rename(f"{path}{field}", changed[field])
    return _lists_renamed(changed, path, rename)


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
    for field in ("model", "base_model"):
        if entry.get(field) is not None:
            entry[field] = rename(f"{path}{field}", entry[field])
    return _lists_renamed(entry, path, rename)
