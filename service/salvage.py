"""What planning can still look at of a recipe that was refused, so that one answer says everything. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from service.recipe import MAX_MODELS, Recipe
from workers.methods import METHODS
from workers.methods.base import Method, Parameters
from workers.methods.resolve import MAX_PARAMETERS

_KEPT = (
    "base_model",
    "dtype",
    "out_dtype",
    "profile",
    "missing_tensors",
    "extra_tensors",
    "mismatched_tensors",
    "vocabularies",
)
"""Fields that decide what is read and what fits together, besides the method and the models."""

_MOST_ALLOWING = {
    "missing_tensors": "base",
    "extra_tensors": "drop",
    "mismatched_tensors": "base",
    "vocabularies": "ignore",
}


def salvage(value: Any) -> Recipe | None:
    """The recipe without what is wrong with it; ``None`` where that leaves no model.

    Nothing comes of it that the recipe, once mended, might not bring up as well: what a malformed field may
    have allowed is allowed, and the models are averaged, which takes the least memory, where there is no
    telling what else was meant.
    """
    listed = value.get("models") if isinstance(value, Mapping) else None
    if not isinstance(listed, list | tuple) or len(listed) > MAX_MODELS:
        return None
    entries = [entry for entry in listed if isinstance(entry, Mapping) and _is_sound(models=[_named(entry)])]
    sound = {name: value[name] for name in _KEPT if name in value and _is_sound(**{name: value[name]})}
    known = value.get("merge_method")
    method = METHODS.get(known) if isinstance(known, str) else None
    allowed = {name: most for name, most in _MOST_ALLOWING.items() if name in value and name not in sound}
    if value.get("tokenizer_source") is not None or value.get("tokenizer") is not None:
        allowed |= {"vocabularies": "ignore", "mismatched_tensors": "base"}  # what it would have made fit
    if sound.get("base_model") is None and (
        method is None or method.base == "required" or value.get("base_model") is not None
    ):  # what the base would have decided
        allowed |= {"missing_tensors": "base", "extra_tensors": "drop"}
    rest = {**sound, **allowed, "models": [_named(entry) for entry in entries]}
    if value.get("buffers") is not None and entries:
        names = [sound.get("base_model") or entries[0]["model"], *(entry["model"] for entry in entries)]
        rest["buffers"] = value["buffers"] if value["buffers"] in names else names[0]
    attempts = [rest | {"merge_method": "linear"}]
    if method is not None:
        plain = rest | {"merge_method": method.name}
        attempts = [plain | _parameters(method, value, entries), plain, *attempts]
    return next((recipe for recipe in map(_recipe, attempts) if recipe is not None), None)


def _named(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": entry.get("model")}


def _recipe(value: Mapping[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(value)
    except ValidationError:
        return None


def _is_sound(**fields: Any) -> bool:
    """Whether nothing is wrong with these fields by themselves."""
    return _recipe({"merge_method": "linear", "models": [{"model": "any"}], **fields}) is not None


def _parameters(method: Method, value: Mapping[str, Any], entries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of a recipe that set parameters, with those that the method takes."""
    own = method.model_parameters
    return {
        "parameters": _taken(value.get("parameters"), method.parameters, own),
        "models": [_named(entry) | {"parameters": _taken(entry.get("parameters"), own)} for entry in entries],
    }


def _taken(values: Any, *kinds: type[Parameters]) -> dict[str, Any]:
    if not isinstance(values, Mapping) or len(values) > MAX_PARAMETERS:
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and any(_takes(kind, name, value) for kind in kinds)
    }


def _takes(kind: type[Parameters], name: str, value: Any) -> bool:
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        return all(
            item["loc"][:1] != (name,) for item in error.errors(include_url=False, include_input=False)
        )
    return True
