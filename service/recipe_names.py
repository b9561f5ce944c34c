"""The names of models in a recipe's data, wherever they are written; apart, since it needs nothing but Python. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

DOCUMENTS: Final = "documents"
"""The key of a recipe's documents, where it has several."""

_PLACE = r"(?:[sS]3://|[fF][iI][lL][eE]://|/)"
_BEFORE_PLACE = re.compile(rf"\+(?={_PLACE})")
_URI = re.compile(r"[A-Za-z0-9]+://")


def split_adapter(name: str) -> tuple[str, str | None]:
    """A model's name as it is written, told apart: the model, and the LoRA adapter on top of it where it has one.

    As in mergekit, ``+`` comes between the two. Within an ``s3://`` or ``file://`` URI it may be part of a name, and
    so counts only before another place.

    >>> split_adapter("org/base@main+org/lora")
    ('org/base@main', 'org/lora')
    >>> split_adapter("s3://bucket/a+b")
    ('s3://bucket/a+b', None)
    >>> split_adapter("s3://bucket/a+b+s3://bucket/lora")
    ('s3://bucket/a+b', 's3://bucket/lora')

    :raises ValueError: there is more than one adapter, or nothing on one side.
    """
    parts: list[str] = []
    for part in _BEFORE_PLACE.split(name):
        parts += [part] if _URI.match(part) else part.split("+")
    if len(parts) == 1:
        return name, None
    if len(parts) > 2 or not all(parts):
        raise ValueError(
            f"{name!r}: one adapter is written `model+adapter`; in the path of a file:// URI, `+` itself is %2B"
        )
    return parts[0], parts[1]


_VOCABULARIES = ("base", "union")
"""What may stand where a model's name decides the vocabulary."""


def with_names(data: Mapping[str, Any], rename: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A recipe's data with every model in it called what ``rename`` says, given its place and its name.

    Of several documents the names of the merges themselves stay.
    """
    documents = data.get(DOCUMENTS)
    if not isinstance(documents, list):
        return _document_renamed(data, "", rename)
    stages = [each.get("name") for each in documents if isinstance(each, dict)]

    def rename_model(place: str, name: Any) -> Any:
        merge, plus, adapter = name.partition("+") if isinstance(name, str) else (name, "", "")
        if merge not in stages:
            return rename(place, name)
        return f"{merge}+{rename(place, adapter)}" if plus else name

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
        keyword = field == "tokenizer_source" and changed.get(field) in _VOCABULARIES
        if changed.get(field) is not None and not keyword:
            changed[field] = rename(f"{path}{field}", changed[field])
    if isinstance(tokenizer := data.get("tokenizer"), dict):
        changed["tokenizer"] = _tokenizer_renamed(tokenizer, path, rename)
    changed = _lists_renamed(changed, path, rename)
    if isinstance(template := data.get("chat_template"), str) and _is_named(template, data):
        changed["chat_template"] = rename(f"{path}chat_template", template)
    return changed


def _is_named(template: str, data: Mapping[str, Any]) -> bool:
    """Whether a template is that of a model in the recipe's lists, with its adapter where that has a key of its own."""
    named = _named(data)
    try:
        return template in named or named.issuperset(split_adapter(template))
    except ValueError:
        return False


def _named(data: Mapping[str, Any]) -> set[str]:
    """The models of a recipe, by the names in its lists: what else may stand where a model may is none of these."""
    names: set[str] = {data["base_model"]} if isinstance(data.get("base_model"), str) else set()

    def note(_place: str, name: Any) -> Any:
        names.update([name] if isinstance(name, str) else [])
        return name

    _lists_renamed(dict(data), "", note)
    return names


def _tokenizer_renamed(
    tokenizer: dict[str, Any], path: str, rename: Callable[[str, Any], Any]
) -> dict[str, Any]:
    changed = dict(tokenizer)
    if changed.get("source") is not None and changed["source"] not in _VOCABULARIES:
        changed["source"] = rename(f"{path}tokenizer.source", changed["source"])
    if isinstance(tokens := changed.get("tokens"), dict):
        changed["tokens"] = {
            token: _token_renamed(entry, f"{path}tokenizer.tokens.{token}.source", rename)
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
    for field in ("model", "adapter", "base_model", "fisher", "gram"):
        if entry.get(field) is not None:
            entry[field] = rename(f"{path}{field}", entry[field])
    return _lists_renamed(entry, path, rename)
