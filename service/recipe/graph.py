"""A recipe of several documents: merges that use earlier ones by their names, and the one of them that is the output.

Reference: ``mergekit-multi``, whose behaviour was established by running it. The order of the documents says
nothing; each runs after those that it uses. Exactly one of them is the output: the one without a name, or where all
have names the one that no other uses. What the output does not use is not made. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.recipe.language import Recipe
from service.recipe.parsing import key_hint, load_yaml, parse_recipe
from service.recipe.sizes import check_sizes
from service.recipe_names import DOCUMENTS
from workers.errors import RecipeError
from workers.task import canonical_json

MAX_DOCUMENTS = 64
"""Most documents of a recipe."""

MAX_PLACES = 256
"""Most models, adapters and checkpoints of statistics that a recipe reads, all its documents together."""

_NAME = re.compile(r"[^\s/+~.:@][^/+:@]*(/[^/+:@]+)?")
"""What a document may be called: nothing that is a place, or says more than a name."""

_MOST_PROBLEMS = 50
_MOST_WRONG = 4
"""Most documents that are looked into after the first that is wrong."""


@dataclass(frozen=True)
class Graph:
    """The merges of a recipe. Frozen; one document is a graph, too."""

    recipes: tuple[Recipe, ...]
    """The documents, as they were written."""

    def __post_init__(self) -> None:
        problems = _name_problems(self.recipes) or _order_problems(self.recipes) or self._problems()
        if problems:
            raise RecipeError(*problems)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The places of the documents that are run, in that order, the output last.

        It does not depend on how they were written: of those that could be next, the first by name is.
        """
        found, _ = _ordered(self.recipes)
        wanted = {_ends(self.recipes)[0]}
        uses = _uses(self.recipes)
        for place in reversed(found):
            wanted |= uses[place] if place in wanted else set()
        return tuple(place for place in found if place in wanted)

    @property
    def output(self) -> Recipe:
        """The merge that makes the output."""
        return self.recipes[self.order[-1]]

    @property
    def earlier(self) -> tuple[tuple[int, Recipe], ...]:
        """The merges before it, with their places, in the order in which they are run."""
        return tuple((place, self.recipes[place]) for place in self.order[:-1])

    @property
    def notices(self) -> list[str]:
        """What the user should know of documents that are not run."""
        left = sorted({*range(len(self.recipes))} - {*self.order})
        return [
            f"{self.recipes[place].name}: the output does not use this merge, so it is not made"
            for place in left
        ]

    @property
    def stages(self) -> frozenset[str]:
        """What the documents are called."""
        return frozenset(recipe.name for recipe in self.recipes if recipe.name is not None)

    @property
    def names(self) -> list[str]:
        """Every model that is read, once, as the recipe names it: not the merges in between."""
        stages = self.stages
        return [name for name in self._adapted if name not in stages]

    @property
    def adapted(self) -> dict[str, tuple[str, str | None]]:
        """The names of every model and of its adapter, where it has one, by what :attr:`names` calls it."""
        stages = self.stages
        return {name: parts for name, parts in self._adapted.items() if name not in stages}

    @property
    def checkpoints(self) -> list[str]:
        """Every model, and every checkpoint of statistics, by itself, once: not the merges in between."""
        stages = self.stages
        models = [model for model, _ in self._adapted.values() if model not in stages]
        return list(dict.fromkeys([*models, *self.statistics]))

    @property
    def statistics(self) -> list[str]:
        """Every checkpoint of statistics, once."""
        return list(dict.fromkeys(name for place in self.order for name in self.recipes[place].statistics))

    @property
    def adapters(self) -> list[str]:
        """Every adapter by itself, once."""
        return list(dict.fromkeys(adapter for _, adapter in self._adapted.values() if adapter is not None))

    @property
    def places(self) -> list[str]:
        """Everything that is read, once: not the merges in between."""
        return list(dict.fromkeys([*self.checkpoints, *self.adapters]))

    @cached_property
    def _adapted(self) -> dict[str, tuple[str, str | None]]:
        recipes = [self.recipes[place] for place in reversed(self.order)]
        return {name: parts for recipe in recipes for name, parts in recipe.adapted.items()}

    def _problems(self) -> list[str]:
        """What is wrong with how the documents use each other, and with how much they read."""
        problems = [
            f"{_at(place)}.output_kind: is for the document that makes the output; {recipe.name!r} is used as a model"
            for place, recipe in self.earlier
            if recipe.output_kind == "adapter"
        ]
        problems += [
            f"{_at(place)}: statistics are read from where they are, and {name!r} is the merge of that name"
            for place in self.order
            for name in self.recipes[place].statistics
            if name in self.stages
        ]
        place, last = self.order[-1], self.output
        if last.output_kind == "adapter" and last.base_model in self.stages:
            problems.append(
                f"{_at(place)}.base_model: {last.base_model!r} is gone once the adapter is made; an adapter needs a "
                "model that stays"
            )
        if len(self.places) > MAX_PLACES:
            problems.append(
                f"models: {len(self.places)} places in all, adapters and checkpoints of statistics among them, more "
                f"than the {MAX_PLACES} that are read"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, without what was left at its default; several as ``{"documents": [...]}``."""
        documents = [recipe.to_json() for recipe in self.recipes]
        return documents[0] if len(documents) == 1 else {DOCUMENTS: documents}

    def to_yaml(self, names: Mapping[str, str] | None = None) -> str:
        """The recipe as YAML, as it goes to the model card; ``names`` is what to call its models there."""
        return "---\n".join(recipe.to_yaml(names) for recipe in self.recipes)

    def canonical(self) -> str:
        """The one text of the recipe, for digests."""
        return canonical_json(self.to_json())


def graph_of(recipe: Recipe | Graph) -> Graph:
    """A recipe of one document as a graph."""
    return recipe if isinstance(recipe, Graph) else Graph((recipe,))


def parse_documents(value: Any) -> Graph:
    """Read a recipe of one document or several from JSON-like data.

    Several are a list, or ``{"documents": [...]}``.

    :raises RecipeError: lists every problem, each with the document's place and the field's name.
    """
    if isinstance(value, dict) and DOCUMENTS in value:
        if beside := [key for key in value if key != DOCUMENTS]:
            raise RecipeError(
                f"{beside[0]}: is not a key beside `documents`{key_hint(beside[0], [DOCUMENTS])}; it belongs into "
                "one of them"
            )
        value = value[DOCUMENTS]
        if not isinstance(value, list):
            raise RecipeError("documents: is a list of recipes")
    if not isinstance(value, list):
        return Graph((parse_recipe(value),))
    if not value:
        raise RecipeError("the recipe is empty")
    if len(value) > MAX_DOCUMENTS:
        raise RecipeError(f"documents: {len(value)} of them, more than the {MAX_DOCUMENTS} that are read")
    if len(value) == 1:
        return Graph((parse_recipe(value[0]),))
    check_sizes(value)
    recipes: list[Recipe] = []
    problems: list[str] = []
    for place, document in enumerate(value):
        if place - len(recipes) > _MOST_WRONG:
            break
        try:
            recipes.append(parse_recipe(document))
        except RecipeError as error:
            problems += [f"{_at(place)}.{problem}" for problem in error.problems]
    if problems:
        shown, more = problems[:_MOST_PROBLEMS], len(problems) - _MOST_PROBLEMS
        raise RecipeError(*shown, *([f"and {more} more problem(s)"] if more > 0 else []))
    return Graph(tuple(recipes))


def parse_documents_yaml(text: str) -> Graph:
    """Read a recipe from mergekit's YAML, of one document or several.

    :raises RecipeError: see :func:`load_yaml` and :func:`parse_documents`.
    """
    return parse_documents(load_yaml(text))


def _name_problems(recipes: tuple[Recipe, ...]) -> list[str]:
    """What is wrong with the names of the documents."""
    problems = []
    first: dict[str | None, int] = {}
    for place, recipe in enumerate(recipes):
        name = recipe.name
        if name is not None and not _NAME.fullmatch(name):
            path = "name" if len(recipes) == 1 else f"{_at(place)}.name"
            problems.append(
                f"{path}: {name!r} could be a place or a model with an adapter; use letters, digits, dots and hyphens"
            )
        if name not in first:
            first[name] = place
        elif name is None:
            problems.append(
                f"{_at(place)}: has no `name`, as {_at(first[name])} has none: only the one that makes the output "
                "may be without"
            )
        else:
            problems.append(f"{_at(place)}.name: {_at(first[name])} is called {name!r} already")
    return problems


def _order_problems(recipes: tuple[Recipe, ...]) -> list[str]:
    """Why there is no order to run the documents in, or not one output."""
    _, circle = _ordered(recipes)
    if circle:
        told = " → ".join(repr(name) for name in circle)
        return [f"documents: they use each other in a circle, so none can be the first: {told}"]
    ends = _ends(recipes)
    if len(ends) == 1:
        return []
    told = ", ".join(repr(recipes[place].name) for place in ends)
    return [
        f"documents: nothing uses {told}, and a recipe makes one output: leave its `name` out where that is, or post "
        "each of them as a recipe of its own"
    ]


def _ordered(recipes: tuple[Recipe, ...]) -> tuple[list[int], list[str]]:
    """The documents' places in the order to run them in; or, where there is none, names that lead in a circle."""
    uses = _uses(recipes)
    found: list[int] = []
    left = sorted(range(len(recipes)), key=lambda place: (recipes[place].name is None, recipes[place].name))
    while left:
        following = next((place for place in left if all(used in found for used in uses[place])), None)
        if following is None:
            return [], [str(recipes[place].name) for place in _circle(left[0], uses, found)]
        left.remove(following)
        found.append(following)
    return found, []


def _uses(recipes: tuple[Recipe, ...]) -> list[set[int]]:
    """The places of the documents that each of them uses."""
    by_name = {recipe.name: place for place, recipe in enumerate(recipes) if recipe.name is not None}
    return [
        {by_name[model] for model, _ in recipe.adapted.values() if model in by_name} for recipe in recipes
    ]


def _ends(recipes: tuple[Recipe, ...]) -> list[int]:
    """The documents that could be the output: the one without a name, else those that no other uses."""
    nameless = [place for place, recipe in enumerate(recipes) if recipe.name is None]
    used = set[int]().union(*_uses(recipes))
    return nameless or [place for place in range(len(recipes)) if place not in used]


def _circle(place: int, uses: list[set[int]], done: Iterable[int]) -> list[int]:
    """Places that use each other in a circle, the first once more at the end; each left one uses another left one."""
    done = set(done)
    walked: list[int] = []
    while place not in walked:
        walked.append(place)
        place = min(uses[place] - done)
    return [*walked[walked.index(place) :], place]


def _at(place: int) -> str:
    return f"{DOCUMENTS}[{place}]"
