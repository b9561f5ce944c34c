"""From a recipe's text to the recipe, and everything that is wrong with it in words. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from service.recipe.entries import MAX_MODELS, MAX_SLICES, ModelEntry, ModuleEntry, SliceEntry, SourceEntry
from service.recipe.language import Recipe
from service.recipe.sizes import check_sizes
from service.recipe.yaml_text import load_documents
from service.recipe_names import DOCUMENTS
from workers.errors import RecipeError
from workers.methods import METHODS

MAX_RECIPE_CHARACTERS = 1 << 18
"""Longest recipe text that is read."""

_NOT_YET = {
    "residual_weight": "is not supported; mergekit reads it and makes nothing of it",
}

_PARAMETERS = frozenset(
    field.alias or name
    for method in METHODS.values()
    for model in (method.parameters, method.model_parameters)
    for name, field in model.model_fields.items()
)
"""What is set under `parameters`, by whichever method."""

_MOST_PROBLEMS = 50
_MOST_CHARACTERS = 500
_OWN_FIELDS = ("dtype", "out_dtype", "tokenizer_source", "profile", "seed", "missing_tensors", "extra_tensors",
               "mismatched_tensors", "buffers", "output_kind", "rank", "vocabularies", "tokenizer",
               "chat_template")  # fmt: skip
"""Fields without which the rest of a recipe still makes sense."""

_LISTS = {"models", "slices", "modules"}
"""Where a recipe says what is merged."""

_KINDS: Mapping[str, tuple[str, type[BaseModel]]] = {
    "models": ("a model", ModelEntry),
    "sources": ("a source", SourceEntry),
    "slices": ("a slice", SliceEntry),
    "modules": ("a module", ModuleEntry),
}
"""What the lists of a recipe hold."""


def parse_recipe(value: Any) -> Recipe:
    """Read a recipe from JSON-like data.

    :raises RecipeError: lists every problem, each with the field's name.
    """
    if not isinstance(value, dict):
        raise RecipeError("the recipe must be a mapping with `merge_method` and `models`")
    if DOCUMENTS in value:
        raise RecipeError("documents: there are several here, where one recipe is read")
    for name, most in (("models", MAX_MODELS), ("slices", MAX_SLICES)):  # before each of them is looked into
        listed = value.get(name)
        if isinstance(listed, list) and len(listed) > most:
            raise RecipeError(f"{name}: {len(listed)} of them, more than the {most} that are read")
    check_sizes([value])
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        problems = _recipe_problems(error)
        rest = _without_wrong_fields(value, error)
    try:  # the checks across fields only run when every field is well-formed
        Recipe.model_validate(rest)
    except ValidationError as error:
        problems += _recipe_problems(error)
    raise RecipeError(*_presentable(problems))


def parse_yaml(text: str) -> Recipe:
    """Read a recipe from mergekit's YAML (or JSON, which is YAML).

    :raises RecipeError: see :func:`load_yaml` and :func:`parse_recipe`.
    """
    return parse_recipe(load_yaml(text))


def load_yaml(text: str) -> Any:
    """The data that a recipe's YAML stands for; of several documents ``{"documents": [...]}``.

    :raises RecipeError: the text is too long, or is not YAML.
    """
    if len(text) > MAX_RECIPE_CHARACTERS:
        raise RecipeError(f"the recipe is longer than {MAX_RECIPE_CHARACTERS} characters")
    found = load_documents(text)
    documents = [each for each in found if each is not None] or found  # after a last `---` there is nothing
    if not documents:
        raise RecipeError("the recipe is empty")
    return documents[0] if len(documents) == 1 else {DOCUMENTS: documents}


def validation_problems(error: ValidationError) -> list[str]:
    """One sentence per problem, each beginning with the field's path."""
    problems: list[str] = []
    for item in error.errors(include_url=False):
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in item["loc"])[1:]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, RecipeError):
            problems.extend(cause.problems)
            continue
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{path}: {message}" if path else message)
    return problems


def _recipe_problems(error: ValidationError) -> list[str]:
    """As :func:`validation_problems`, and what an unknown key may have meant."""
    problems = validation_problems(error)
    items = error.errors(include_url=False)
    # A list of which no entry is as it should be counts as empty: that is said of each entry.
    spurious = {problems[n] for n, item in enumerate(items) if item["type"] == "too_short" and item["input"]}
    for number, item in enumerate(items):
        if item["type"] != "extra_forbidden" or number >= _MOST_PROBLEMS:
            continue
        *parents, key = item["loc"]
        path = problems[number].rpartition(": ")[0]
        if key in _NOT_YET:
            problems[number] = f"{path}: {_NOT_YET[str(key)]}"
            continue
        what, known = _kind(parents)
        hint = "; write it under `parameters`" if key in _PARAMETERS else key_hint(key, known.model_fields)
        problems[number] = f"{path}: is not a key of {what}{hint}"
    return [problem for problem in problems if problem not in spurious]


def key_hint(key: object, known: Iterable[str]) -> str:
    """What to add to the news that ``key`` is none of the ``known`` ones: which was meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(key)[:64], names, n=1)
    return f"; did you mean `{near[0]}`?" if near else f" ({', '.join(names)})"


def _kind(parents: Iterable[object]) -> tuple[str, type[BaseModel]]:
    """What has the key at the end of a path, in words and as a type."""
    lists = [_KINDS[step] for step in parents if isinstance(step, str) and step in _KINDS]
    return lists[-1] if lists else ("a recipe", Recipe)


def _without_wrong_fields(value: Mapping[Any, Any], error: ValidationError) -> Any:
    """The recipe without unknown keys and malformed options."""
    items = error.errors(include_url=False)
    unknown = {item["loc"] for item in items if item["type"] == "extra_forbidden"}
    wrong = unknown | {
        (item["loc"][0],) for item in items if item["loc"][:1] in {(name,) for name in _OWN_FIELDS}
    }

    empty = {item["loc"] for item in items if item["type"] == "too_short" and not item["input"]}
    if len(_LISTS & value.keys()) > 1:
        wrong |= empty & {(name,) for name in _LISTS}

    # Looked into is only what holds something wrong: by aliases a short text may stand for very much.
    holders = {place[:depth] for place in wrong for depth in range(len(place))}

    def pruned(node: Any, path: tuple[Any, ...]) -> Any:
        if path not in holders:
            return node
        if isinstance(node, Mapping):
            return {
                key: pruned(inner, (*path, key)) for key, inner in node.items() if (*path, key) not in wrong
            }
        if isinstance(node, list | tuple):
            return [pruned(inner, (*path, index)) for index, inner in enumerate(node)]
        return node

    return pruned(value, ())


def _presentable(problems: list[str]) -> list[str]:
    """Each problem once, none endless, and not thousands of them."""
    distinct = list(dict.fromkeys(problems))
    shown = [
        text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
        for text in distinct[:_MOST_PROBLEMS]
    ]
    more = len(distinct) - len(shown)
    return [*shown, f"and {more} more problem(s)"] if more else shown
