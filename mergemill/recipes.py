"""Recipes as the client and the command line read them: YAML to a mapping, and local paths to URIs.

What a recipe may say is the service's to decide; nothing is checked here but that it is a mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.recipe.yaml_text import load_documents
from service.recipe_names import DOCUMENTS, split_adapter, with_names
from workers.errors import RecipeError


def read(text: str) -> dict[str, Any]:
    """A recipe's YAML (or JSON, which is YAML) as a mapping; of several documents ``{"documents": [...]}``.

    :raises RecipeError: it is not YAML, not a mapping, or asks for too much.
    """
    found = load_documents(text)
    documents = [each for each in found if each is not None] or found  # after a last `---` there is nothing
    if not documents:
        raise RecipeError("the recipe is empty")
    if len(documents) > 1:
        return {DOCUMENTS: documents}
    if not isinstance(documents[0], dict):
        raise RecipeError(
            "the recipe must be a mapping with `merge_method` and `models`, `slices` or `modules`"
        )
    return documents[0]


def as_mapping(recipe: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe as a mapping; a list is of its documents."""
    if isinstance(recipe, Mapping):
        return dict(recipe)
    return {DOCUMENTS: [dict(document) for document in recipe]}


def localise(recipe: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The recipe with every local directory that it names as an absolute ``file://`` URI.

    A name that is a directory, seen from ``directory``, means that directory; hub names and URIs stay. Of
    ``model+adapter`` that goes for both. The same name is written the same way everywhere, so that `tokenizer_source`
    still names its model.

    :raises RecipeError: names that can only be paths, and lead nowhere.
    """
    problems: list[str] = []

    def place(field: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value  # the service says what is wrong with it
        try:
            return "+".join(local_uri(part, directory) for part in _parts(value, directory))
        except RecipeError as error:
            problems.extend(f"{field}: {problem}" for problem in error.problems)
            return value

    changed = with_names(recipe, place)
    if problems:
        raise RecipeError(*dict.fromkeys(problems))
    return changed


def _parts(name: str, directory: Path) -> list[str]:
    """A model's name and its adapter's; a directory that has a ``+`` in its own name is one."""
    if "+" not in name or ("://" not in name and (directory / Path(name).expanduser()).is_dir()):
        return [name]
    try:
        return [part for part in split_adapter(name) if part is not None]
    except ValueError:
        return [name]  # the service says what is wrong with it


def local_uri(name: str, directory: Path) -> str:
    """``name`` as an absolute ``file://`` URI if it is a directory here; a URI or a hub name as it is.

    :raises RecipeError: it is written as a path, and no directory is there.
    """
    if "://" in name:
        return name
    path = directory / Path(name).expanduser()
    if path.is_dir():
        return path.resolve().as_uri()
    if name.startswith(("/", "./", "../", "~")) or name in {".", ".."}:
        raise RecipeError(f"{name}: no model here: there is no directory {path.resolve()}")
    return name


def output_uri(name: str, directory: Path) -> str:
    """Where a checkpoint goes: URIs as they are, anything else as a path seen from ``directory``."""
    if "://" in name:
        return name
    return (directory / Path(name).expanduser()).resolve().as_uri()


def hub_name_hint(recipe: Mapping[str, Any], problems: Sequence[str], directory: Path) -> str | None:
    """What to add to ``problems`` about names that the service does not know: they are no directory here either."""
    names: dict[str, None] = {}

    def note(field: str, value: Any) -> Any:
        if isinstance(value, str):
            names.update(dict.fromkeys(_parts(value, directory)))
        return value

    with_names(recipe, note)
    unknown = [
        name for name in names if "://" not in name and any(repr(name) in problem for problem in problems)
    ]
    if not unknown:
        return None
    return f"there is no directory {' or '.join(map(repr, unknown))} in {directory} either"
