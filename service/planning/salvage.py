"""What planning can still look at of a recipe that was refused, so that one answer says everything. Pure.

What is left of slices and modules keeps its place, so that problems name the places of the recipe as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from service.recipe import MAX_MODELS, ModelEntry, Recipe, SourceEntry, graph_of
from service.recipe.entries import MAX_MODULES, MAX_SLICES, Frozen
from service.recipe.regions import DEFAULT_MODULES
from service.recipe.sizes import check_sizes
from service.recipe.values import leaves, setting_problems
from service.recipe_names import DOCUMENTS
from workers.errors import RecipeError
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

_NO_LAYERS = (0, 0)


def salvage(value: Any) -> Recipe | None:
    """The recipe without what is wrong with it; ``None`` where that leaves no model.

    Nothing comes of it that the recipe, once mended, might not bring up as well: what a malformed field may
    have allowed is allowed, and the models are averaged, which takes the least memory, where there is no
    telling what else was meant. Of a slice whose layers are not known none are merged, and a module of which
    nothing is left is one model's. Where not even that can be told, the models are only opened. Of several documents
    nothing is left: what the others would make of one that is wrong cannot be told.
    """
    if isinstance(value, Mapping) and value.keys() == {DOCUMENTS}:
        value = value[DOCUMENTS]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Mapping) or not _is_bounded(value):
        return None
    sound = {name: value[name] for name in _KEPT if name in value and _is_sound(**{name: value[name]})}
    known = value.get("merge_method")
    method = METHODS.get(known) if isinstance(known, str) else None
    named = list(dict.fromkeys(_model_names(value)))
    if not named:
        return None
    base = sound.get("base_model")
    allowed = {name: most for name, most in _MOST_ALLOWING.items() if name in value and name not in sound}
    if value.get("tokenizer_source") is not None or value.get("tokenizer") is not None:
        allowed |= {"vocabularies": "ignore", "mismatched_tensors": "base"}  # what it would have made fit
    if (
        base is None and (method is None or method.base == "required" or value.get("base_model") is not None)
    ) or (not _are_bases_sound(value)):  # what the base would have decided
        allowed |= {"missing_tensors": "base", "extra_tensors": "drop"}
    rest = {**sound, **allowed}
    if value.get("buffers") is not None:
        names = [base or named[0], *named]
        rest["buffers"] = value["buffers"] if value["buffers"] in names else names[0]
    opened = {"models": [{"model": name} for name in named[:MAX_MODELS]], "buffers": named[0]}
    attempts = [sound | _MOST_ALLOWING | opened | {"merge_method": "linear"}]
    plain = _Left(base or named[0], base is not None, None).of(value)
    if plain is not None:
        attempts.insert(0, rest | plain | {"merge_method": "linear"})
        if method is not None:
            full = _Left(base or named[0], base is not None, method).of(value) or plain
            attempts = [rest | each | {"merge_method": method.name} for each in (full, plain)] + attempts
    return next((recipe for recipe in map(_recipe, attempts) if recipe is not None), None)


def _is_bounded(value: Mapping[str, Any]) -> bool:
    try:
        check_sizes([value])
    except RecipeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Left:
    """What is left of the lists of a recipe."""

    model: str
    """One of its models, which stands where there is no telling which was meant."""
    has_base: bool
    """Whether it is the recipe's base."""
    method: Method | None
    """The method whose parameters are kept; ``None`` leaves them out."""

    def of(self, value: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is merged, with parameters; ``None`` when that cannot be told."""
        lists: dict[str, Any] | None = None
        if named := self._models(value.get("models")):
            lists = {"models": named}
        elif slices := self._slices(value.get("slices")):
            lists = {"slices": slices}
        elif modules := self._modules(value.get("modules")):
            lists = {"modules": modules}
        return None if lists is None else lists | self._parameters(value)

    def _models(self, listed: Any) -> list[dict[str, Any]]:
        return [
            {"model": entry["model"]} | self._statistic(entry) | self._parameters(entry, of_model=True)
            for entry in _listed(listed, MAX_MODELS)
            if _name(entry) is not None
        ]

    def _slices(self, listed: Any) -> list[dict[str, Any]]:
        entries = _listed(listed, MAX_SLICES)
        if not any(_name(source) is not None for entry in entries for source in _sources(entry)):
            return []
        return [self._slice(entry) for entry in entries]

    def _slice(self, entry: Any) -> dict[str, Any]:
        sources = _sources(entry)
        instead = next((name for name in map(_name, sources) if name is not None), None)
        if instead is None:
            return {"sources": [{"model": self.model, "layer_range": _NO_LAYERS}]}
        ranges = [source.get("layer_range") if isinstance(source, Mapping) else None for source in sources]
        are_known = len(counts := set(map(_count, ranges))) == 1 and None not in counts
        kept: dict[str, Any] = {
            "sources": [
                {"model": _name(source) or instead, "layer_range": layers if are_known else _NO_LAYERS}
                | self._statistic(source)
                | self._parameters(source, of_model=True)
                for source, layers in zip(sources, ranges, strict=True)
            ]
        }
        if (base := entry.get("base_model")) is not None and _is_name(base):
            kept["base_model"] = base
        return kept | self._parameters(entry)

    def _modules(self, listed: Any) -> dict[str, Any] | None:
        """The modules under their own names, which decide what is whose; ``None`` when those are not known."""
        if not isinstance(listed, Mapping) or len(listed) > MAX_MODULES:
            return None
        kept = {}
        for name, entry in listed.items():
            found = self._module(entry)
            if found is None and name in DEFAULT_MODULES and not self.has_base:
                return None  # it names the model that the modules' names are looked for in
            kept[name] = found or {"models": [{"model": self.model}]}
        return kept

    def _module(self, entry: Any) -> dict[str, Any] | None:
        if not isinstance(entry, Mapping):
            return None
        if named := self._models(entry.get("models")):
            return {"models": named} | self._parameters(entry)
        if slices := self._slices(entry.get("slices")):
            return {"slices": slices} | self._parameters(entry)
        return None

    def _statistic(self, entry: Any) -> dict[str, Any]:
        """The checkpoint that the method needs beside a model, where a sound one is named."""
        key = None if self.method is None or self.method.statistic is None else self.method.statistic.name
        if key is None or not isinstance(entry, Mapping) or entry.get(key) is None:
            return {}
        return {key: entry[key]} if _fits(ModelEntry, model="any", **{key: entry[key]}) else {}

    def _parameters(self, entry: Any, *, of_model: bool = False) -> dict[str, Any]:
        """The parameters of an entry that the method takes there."""
        method = self.method
        values = entry.get("parameters") if isinstance(entry, Mapping) else None
        if method is None or not isinstance(values, Mapping) or len(values) > MAX_PARAMETERS:
            return {}
        kinds = (method.model_parameters,) if of_model else (method.parameters, method.model_parameters)
        return {
            "parameters": {
                name: setting
                for name, setting in values.items()
                if isinstance(name, str) and any(_takes(kind, name, setting) for kind in kinds)
            }
        }


def _listed(value: Any, most: int) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) and len(value) <= most else ()


def _sources(entry: Any) -> Sequence[Any]:
    return _listed(entry.get("sources"), MAX_MODELS) if isinstance(entry, Mapping) else ()


def _name(entry: Any) -> str | None:
    """The model of an entry of some list, if it names one."""
    name = entry.get("model") if isinstance(entry, Mapping) else None
    return name if _is_name(name) else None


def _parts(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What has a list of models or slices: the recipe, and its modules."""
    yield value
    modules = value.get("modules")
    if isinstance(modules, Mapping) and len(modules) <= MAX_MODULES:
        yield from (entry for entry in modules.values() if isinstance(entry, Mapping))


def _model_names(value: Mapping[str, Any]) -> Iterator[str]:
    """Every model that is listed somewhere."""
    for part in _parts(value):
        slices = _listed(part.get("slices"), MAX_SLICES)
        sources = [source for entry in slices for source in _sources(entry)]
        yield from filter(None, map(_name, [*_listed(part.get("models"), MAX_MODELS), *sources]))


def _are_bases_sound(value: Mapping[str, Any]) -> bool:
    """Whether every slice that has a base of its own names a model."""
    bases = [
        entry.get("base_model")
        for part in _parts(value)
        for entry in _listed(part.get("slices"), MAX_SLICES)
        if isinstance(entry, Mapping)
    ]
    return all(base is None or _is_name(base) for base in bases)


def _recipe(value: Mapping[str, Any]) -> Recipe | None:
    try:
        return graph_of(Recipe.model_validate(value)).output
    except (ValidationError, RecipeError):
        return None


def _is_sound(**fields: Any) -> bool:
    """Whether nothing is wrong with these fields of a recipe by themselves."""
    return _recipe({"merge_method": "linear", "models": [{"model": "any"}], **fields}) is not None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _fits(ModelEntry, model=value)


def _count(layer_range: Any) -> int | None:
    """How many layers a range has; ``None`` when it is none."""
    try:
        first, last = SourceEntry(model="any", layer_range=layer_range).layer_range
    except ValidationError:
        return None
    return last - first


def _fits(kind: type[Frozen], **fields: Any) -> bool:
    try:
        kind.model_validate(fields)
    except ValidationError:
        return False
    return True


def _takes(kind: type[Parameters], name: str, setting: Any) -> bool:
    """Whether a parameter may have this value, or all those of a gradient or of conditions."""
    return not setting_problems(setting) and all(_takes_one(kind, name, value) for value in leaves(setting))


def _takes_one(kind: type[Parameters], name: str, value: Any) -> bool:
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        return all(
            item["loc"][:1] != (name,) for item in error.errors(include_url=False, include_input=False)
        )
    return True
