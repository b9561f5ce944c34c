"""The names of models in a recipe's data, wherever they are written; apart, since it needs nothing but Python. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_VOCABULARIES = ("base", "union")
"""What may stand where a model's name decides the vocabulary."""


def with_names(data: Mapping[str, Any], rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A recipe's data with every model in it called what ``rename`` says, given its place and its name."""
    changed = dict(data)
    for field in ("base_model", "tokenizer_source", "buffers"):
        keyword = field == "tokenizer_source" and changed.get(field) in _VOCABULARIES
        if changed.get(field) is not None and not keyword:
            changed[field] = rename(field, changed[field])
    if isinstance(tokenizer := data.get("tokenizer"), dict):
        changed["tokenizer"] = _tokenizer_renamed(tokenizer, rename)
    changed = _lists_renamed(changed, "", rename)
    if isinstance(template := data.get("chat_template"), str) and template in _named(data):
        changed["chat_template"] = rename("chat_template", template)
    return changed


def _named(data: Mapping[str, Any]) -> set[str]:
    """The models of a recipe, by the names in its lists: what else may stand where a model may is none of these."""
    names: set[str] = {data["base_model"]} if isinstance(data.get("base_model"), str) else set()

    def note(_place: str, name: Any) -> Any:
        names.update([name] if isinstance(name, str) else [])
        return name

    _lists_renamed(dict(data), "", note)
    return names


def _tokenizer_renamed(tokenizer: dict[str, Any], rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    changed = dict(tokenizer)
    if changed.get("source") is not None and changed["source"] not in _VOCABULARIES:
        changed["source"] = rename("tokenizer.source", changed["source"])
    if isinstance(tokens := changed.get("tokens"), dict):
        changed["tokens"] = {
            token: _token_renamed(entry, f"tokenizer.tokens.{token}.source", rename)
            for token, entry in tokens.items()
        }
    return changed


def _token_renamed(entry: Any, path: str, rename: Callable[[str, Any], Any]) -> Any:
    source = entry.get("source") if isinstance(entry, dict) else None
    if isinstance(source, dict):
        if source.get("model") is None:
            return entry
        return entry | {"source": source | {"model": rename(f"{path}.model", source["model"])}}
    return entry if source is None else entry | {"source": rename(path, source)}


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
