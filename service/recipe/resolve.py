"""From a recipe's parameters to those of one tensor: the nearest place that says something about it wins. Pure.

A model's parameters are looked for in its own section, then the slice's, the module's and the recipe's, by what that
model calls the tensor; those of the whole merge in the last three, by what the output calls it. mergekit does
the same, as running it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.recipe.language import Recipe
from service.recipe.regions import Section, Stretch
from service.recipe.values import Scalar, filters_of, fits, is_plain, value_of
from workers.errors import RecipeError
from workers.methods import get_method
from workers.methods.base import Method
from workers.methods.resolve import model_names, number_names, resolve_parameters
from workers.task import JSONValue

Said = tuple[tuple[str, Scalar], ...]
"""What a recipe says about one tensor: values by parameter."""

_Place = tuple[str, int]
"""A stretch: where its models are listed, and how many of them are meant."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A method's parameters for one tensor, as JSON; shared between tensors, so never changed."""

    shared: dict[str, JSONValue]
    """Those of the whole merge."""
    models: tuple[dict[str, JSONValue], ...]
    """Each merged model's."""
    is_default: bool
    """Whether nothing says anything else than the method's defaults about the models."""


class Resolver:
    """Resolves a recipe's parameters; equal ones are made once, however many tensors share them."""

    def __init__(self, recipe: Recipe) -> None:
        self._method: Method = get_method(recipe.merge_method)
        self._profile = recipe.profile
        self._own_names = model_names(self._method)
        self._numbers = number_names(self._method)
        self._settings: dict[_Place, _Settings] = {}
        self._known: dict[tuple[_Place, Said, tuple[Said, ...]], Resolved | RecipeError] = {}

    def resolve(self, stretch: Stretch, name: str, own_names: Sequence[str], position: float) -> Resolved:
        """The parameters of the output tensor ``name``, which the stretch's merged models call ``own_names``.

        :param position: where its layer lies among the stretch's, from 0 to 1; 0 outside of layers.
        :raises RecipeError: what is said about it does not go together, or something is not said.
        """
        place = (stretch.path, len(stretch.sources))
        settings = self._settings.get(place)
        if settings is None:
            settings = self._settings[place] = _Settings.of(stretch, self._own_names)
        shared = self._said(settings.shared, name, position)
        models = tuple(
            self._said(each, own, position) for each, own in zip(settings.models, own_names, strict=True)
        )
        key = (place, shared, models)
        if key not in self._known:
            self._known[key] = self._resolved(stretch, dict(shared), [dict(said) for said in models])
        found = self._known[key]
        if isinstance(found, RecipeError):
            raise RecipeError(*found.problems)
        return found

    def _said(self, settings: Mapping[str, tuple[Any, ...]], name: str, position: float) -> Said:
        said = []
        for parameter, levels in settings.items():
            is_number = parameter in self._numbers
            values = (value_of(each, name, position, is_number=is_number) for each in levels)
            value = next((found for found in values if found is not None), None)
            if value is not None:
                said.append((parameter, value))
        return tuple(said)

    def _resolved(
        self, stretch: Stretch, shared: dict[str, Any], models: list[dict[str, Any]]
    ) -> Resolved | RecipeError:
        sections = [source.own.path for source in stretch.merged]
        try:
            parameters, own = resolve_parameters(self._method, self._profile, shared, models, sections)
        except RecipeError as error:
            return error
        return Resolved(
            parameters.model_dump(mode="json", by_alias=True),
            tuple(each.model_dump(mode="json", by_alias=True) for each in own),
            all(each.model_dump() == type(each).model_construct().model_dump() for each in own),
        )


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a stretch says: for each parameter all settings that may hold, the nearest first."""

    shared: Mapping[str, tuple[Any, ...]]
    models: tuple[Mapping[str, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, stretch: Stretch, own_names: frozenset[str]) -> _Settings:
        return cls(
            _levels(stretch.shared, lambda name: name not in own_names),
            tuple(
                _levels((source.own, *stretch.shared), lambda name: name in own_names)
                for source in stretch.merged
            ),
        )


def unused_filters(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The filters that are in no name of a tensor, so that nobody reads what they say."""
    wanted = {
        filter_: section.path
        for region in recipe.regions
        for stretch in region.stretches
        for section, _ in stretch.sections
        for setting in section.values.values()
        if not is_plain(setting)
        for filter_ in filters_of(setting)
    }
    for name in names:
        if not wanted:
            break
        wanted = {filter_: path for filter_, path in wanted.items() if not fits(filter_, name)}
    return [f"{path}: the filter {filter_!r} is in no tensor's name" for filter_, path in wanted.items()]


def _levels(sections: Sequence[Section], takes: Callable[[str], bool]) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for section in sections:
        for name, setting in section.values.items():
            if takes(name):
                found[name] = (*found.get(name, ()), setting)
    return found
