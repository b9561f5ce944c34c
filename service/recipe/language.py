"""The recipe: what the user wants, as mergekit's YAML or the same as JSON. Pure.

Reference for the language: mergekit's documented configuration format; docs/recipes.md has all of it. Keys that
Mergemill does not serve yet are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from service.recipe.checks import stretch_problems
from service.recipe.entries import (
    MAX_MODELS,
    MAX_MODULES,
    MAX_SLICES,
    Frozen,
    ModelEntry,
    ModelName,
    ModuleEntry,
    ModuleName,
    ParameterValues,
    SliceEntry,
)
from service.recipe.regions import DEFAULT_MODULES, Region, Section, region_of
from service.recipe.tokenizers import KEYWORDS, MAX_TEMPLATE, TokenizerEntry
from service.recipe_names import split_adapter, with_names
from workers.errors import RecipeError
from workers.methods import METHODS, get_method
from workers.methods.common import ADDING_METHODS
from workers.task import canonical_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The recipe's dtype names, and safetensors' names for them."""

MAX_RANK = 1 << 14
"""Highest rank of an adapter that is made."""

Profile = Literal["paper", "mergekit"]


class Recipe(Frozen):
    """What the user wants. Frozen; planning never rewrites it."""

    name: str | None = Field(default=None, min_length=1, max_length=128)
    """What other documents of the recipe call this merge."""
    merge_method: str
    """Name of the merge method."""
    base_model: ModelName | None = None
    """The common ancestor of the models, for methods that have one."""
    models: tuple[ModelEntry, ...] | None = Field(default=None, min_length=1, max_length=MAX_MODELS)
    """The models, whole, in the order of summation."""
    slices: tuple[SliceEntry, ...] | None = Field(default=None, min_length=1, max_length=MAX_SLICES)
    """Or layers of models, in the order of the output's layers."""
    modules: dict[ModuleName, ModuleEntry] | None = Field(default=None, min_length=1, max_length=MAX_MODULES)
    """Or either for each module of a model that has several."""
    parameters: ParameterValues = Field(default_factory=dict)
    """Global parameters, and defaults for those of modules, slices and models."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Output dtype when `out_dtype` is not set. The arithmetic is always float32."""
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the merged weights; each tensor keeps the base's (or first model's) when neither is set."""
    output_kind: Literal["model", "adapter"] = "model"
    """What is written: the merged model, or a LoRA adapter that makes it of the base model."""
    rank: int | None = Field(default=None, ge=1, le=MAX_RANK, strict=True)
    """Highest rank of that adapter's factors; without it they are the models' own, put together."""
    tokenizer_source: str | None = Field(default=None, max_length=2048)
    """Whose tokens the output has: `union`, `base`, or one of the recipe's models. The base's files are copied when
    neither this nor `tokenizer` is set, and then all vocabularies have to be the same."""
    tokenizer: TokenizerEntry | None = None
    """The same with more to say: where single tokens come from, and padding."""
    chat_template: str | None = Field(default=None, max_length=MAX_TEMPLATE)
    """`auto` (the one that most models have), a template's name, one of the models, or a Jinja template."""
    profile: Profile | None = None
    """Where implementations differ, follow the paper's authors or mergekit 0.1.5."""
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    """Seed of the DARE masks."""
    missing_tensors: Literal["error", "base"] = "error"
    """A model lacks a tensor: refuse, or take the base's (a zero task vector; without a base the model sits out)."""
    extra_tensors: Literal["error", "drop"] = "error"
    """A model has a tensor that the base (or first model) lacks: refuse, or leave it out."""
    mismatched_tensors: Literal["error", "base"] = "error"
    """Shapes differ: refuse, or keep the base's (or first model's) tensor unmerged."""
    buffers: str | None = None
    """The model whose integer and boolean buffers win when they differ."""
    vocabularies: Literal["error", "ignore"] = "error"
    """Tokens differ and there is no tokenizer option: refuse, or merge row by row whatever the rows stand for."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = list(self._problems())
        if problems:
            raise RecipeError(*problems)
        return self

    def _problems(self) -> list[str]:
        lists = [name for name in ("models", "slices", "modules") if getattr(self, name) is not None]
        if not lists:
            return ["models: name what is merged, here or under `slices` or `modules`"]
        problems = [
            f"{name}: there are `{lists[0]}` already; a recipe has one of the two" for name in lists[1:]
        ]
        problems += self._name_problems()
        try:
            method = get_method(self.merge_method)
        except RecipeError as error:
            return [*error.problems, *problems]
        problems += self._adapter_problems()
        stretches = [stretch for region in self.regions for stretch in region.stretches]
        return [*problems, *stretch_problems(method, self.profile, stretches)]

    def _adapter_problems(self) -> list[str]:
        """What does not go together with an adapter as the output."""
        if self.output_kind == "model":
            return [] if self.rank is None else ["rank: is that of an adapter; set `output_kind: adapter`"]
        problems = []
        if self.base_model is None or split_adapter(self.base_model)[1] is not None:
            problems.append(
                "base_model: an adapter needs the model that it lies on, without an adapter of its own"
            )
        if self.models is None:
            problems.append("models: an adapter is made of whole models, not of slices or modules")
        problems += [
            f"{name}: an adapter has no tokenizer of its own: merge to a model to write one"
            for name in ("tokenizer_source", "tokenizer", "chat_template")
            if getattr(self, name) is not None
        ]
        if self.merge_method not in ADDING_METHODS:
            problems.append(
                f"merge_method: what `{self.merge_method}` makes is no sum of what the models add to the base; use "
                f"{' or '.join(map('`{}`'.format, ADDING_METHODS))}, or merge to a model and make an adapter of that"
            )
        return problems

    def _name_problems(self) -> list[str]:
        """What refers to a model that is not there."""
        problems = []
        known = {*self.names, self.base_model}
        if len(known) > MAX_MODELS + 1:
            problems.append(f"models: {len(known)} different ones, more than the {MAX_MODELS} that are read")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            problems.append("tokenizer_source: there is a `tokenizer` already; a recipe has one of the two")
        problems += [f"{place}: {model!r} is not one of the recipe's models"
                     for place, model in self._tokenizer_models if model not in known]  # fmt: skip
        if self.buffers is not None and self.buffers not in known:
            problems.append(f"buffers: {self.buffers!r} is not one of the recipe's models")
        return problems

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The parts of the output, each with what it is made of."""
        method = METHODS.get(self.merge_method)
        role = "none" if method is None else method.base
        shared = (Section("parameters", self.parameters),)
        if self.modules is None:
            return (region_of(None, "", self.models, self.slices, self.base_model, shared, role),)
        return tuple(
            region_of(
                name,
                f"modules.{name}.",
                module.models,
                module.slices,
                self.base_model,
                (Section(f"modules.{name}.parameters", module.parameters), *shared),
                role,
            )
            for name, module in self.modules.items()
        )

    @property
    def reference(self) -> str:
        """The model that decides config and tokenizer: the base, else the first of the main module."""
        if self.base_model is not None:
            return self.base_model
        regions = self.regions
        main = next((region for region in regions if region.name in (None, *DEFAULT_MODULES)), regions[0])
        return main.stretches[0].reference

    @property
    def names(self) -> list[str]:
        """Every model that the recipe names, once, the reference first."""
        listed: list[str] = [self.reference]
        for region in self.regions:
            for stretch in region.stretches:
                listed += [stretch.base] if stretch.base is not None else []
                listed += [source.model for source in stretch.sources]
        return list(dict.fromkeys(listed))

    @property
    def adapted(self) -> dict[str, tuple[str, str | None]]:
        """The names of every model and of its adapter, where it has one, by what :attr:`names` calls it."""
        found = {name: split_adapter(name) for name in self.names}
        return found | {entry.name: entry.places for entry in self._entries() if entry.adapter is not None}

    @property
    def statistics(self) -> list[str]:
        """Every checkpoint of statistics that the merge reads, once."""
        return list(
            dict.fromkeys(
                name
                for region in self.regions
                for stretch in region.stretches
                for source in stretch.merged
                for name in source.statistics.values()
            )
        )

    @property
    def places(self) -> list[str]:
        """Everything that the recipe names to be read, once: models, adapters and statistics."""
        named = [place for pair in self.adapted.values() for place in pair if place]
        return list(dict.fromkeys([*named, *self.statistics]))

    def _entries(self) -> Iterator[ModelEntry]:
        holders: tuple[Recipe | ModuleEntry, ...] = (self, *(self.modules or {}).values())
        for holder in holders:
            yield from holder.models or ()
            for each in holder.slices or ():
                yield from each.sources

    @property
    def vocabulary(self) -> TokenizerEntry | None:
        """What it says of the output's vocabulary, however it is written; ``None`` when it says nothing."""
        if self.tokenizer is None and self.tokenizer_source is not None:
            return TokenizerEntry(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def _tokenizer_models(self) -> list[tuple[str, str]]:
        """The models that are named for the vocabulary, each after the place where they are."""
        if self.tokenizer is not None:
            return [(f"tokenizer.{place}", model) for place, model in self.tokenizer.models]
        source = self.tokenizer_source
        return [] if source is None or source in KEYWORDS else [("tokenizer_source", source)]

    @property
    def most_inputs(self) -> int:
        """Most inputs that one tensor is made of, models and their statistics, the base not counted."""
        return max(
            sum(1 + len(source.statistics) for source in stretch.merged)
            for region in self.regions
            for stretch in region.stretches
        )

    @property
    def out_dtype_name(self) -> str | None:
        """Safetensors dtype of the merged weights, or ``None`` to keep each tensor's."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, without what was left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self, names: Mapping[str, str] | None = None) -> str:
        """The recipe as YAML, as it goes to the model card; ``names`` is what to call its models and
        adapters there."""
        shown = names or {}

        def called_there(_: str, name: Any) -> Any:
            if name in shown:
                return shown[name]
            return "+".join(shown.get(part, part) for part in split_adapter(name) if part is not None)

        called = with_names(self.to_json(), called_there)
        return yaml.safe_dump(called, sort_keys=False, allow_unicode=True)

    def canonical(self) -> str:
        """The one text of the recipe, for digests."""
        return canonical_json(self.to_json())
