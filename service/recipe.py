"""The recipe: what the user wants, as mergekit's YAML or the same as JSON. Pure.

Reference for the language: mergekit's documented configuration format. Keys that Mergemill does not serve
yet are refused by name, never ignored.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workers.errors import RecipeError
from workers.methods import get_method
from workers.methods.resolve import resolve_parameters
from workers.task import canonical_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The recipe's dtype names, and safetensors' names for them."""

MAX_RECIPE_BYTES = 1 << 20
"""Longest recipe text that is read."""

Profile = Literal["paper", "mergekit"]

_NOT_YET = {
    "slices": "layer slicing is not supported yet; list whole models under `models`",
    "modules": "multi-module recipes are not supported yet; merge one module at a time",
    "tokenizer": "building tokenizers is not supported yet; `tokenizer_source` may name `base` or a model",
    "chat_template": "setting a chat template is not supported yet; it is copied with the tokenizer",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class ModelEntry(_Frozen):
    """One model of a recipe."""

    model: str = Field(min_length=1, max_length=2048)
    """`s3://bucket/prefix`, `file:///dir`, an absolute path, or a hub name that `model_roots` maps."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The model's own parameters."""

    @field_validator("model")
    @classmethod
    def _no_adapter(cls, value: str) -> str:
        if "+" in value and not value.startswith(("s3://", "file://", "/")):
            raise ValueError(f"{value!r}: LoRA adapters (`model+adapter`) are not supported yet")
        return value


class Recipe(_Frozen):
    """What the user wants. Frozen; planning never rewrites it."""

    merge_method: str
    """Name of the merge method."""
    base_model: str | None = None
    """The common ancestor of the models, for methods that have one."""
    models: tuple[ModelEntry, ...] = Field(min_length=1, max_length=64)
    """The models, in the order of summation."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Global parameters, and defaults for the models' own."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Output dtype when `out_dtype` is not set. The arithmetic is always float32."""
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the merged weights; each tensor keeps the base's (or first model's) when neither is set."""
    tokenizer_source: str | None = None
    """Whose tokenizer files to copy: `base`, or one of the recipe's models. The base's by default."""
    profile: Profile | None = None
    """Where implementations differ, follow the paper's authors or mergekit 0.1.5."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the DARE masks."""
    missing_tensors: Literal["error", "base"] = "error"
    """A model lacks a tensor: refuse, or take the base's (a zero task vector; without a base the model sits out)."""
    extra_tensors: Literal["error", "drop"] = "error"
    """A model has a tensor that the base (or first model) lacks: refuse, or leave it out."""
    mismatched_tensors: Literal["error", "base"] = "error"
    """Shapes differ: refuse, or keep the base's (or first model's) tensor unmerged."""
    buffers: str | None = None
    """The model whose integer and boolean buffers win when they differ."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key, reason in _NOT_YET.items():
                if key in value:
                    raise ValueError(f"`{key}`: {reason}")
            unknown = [key for key in value if key not in cls.model_fields]
            for key in unknown:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise ValueError(f"`{key}` is not a key of a recipe{hint}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = list(self._problems())
        if problems:
            raise RecipeError(*problems)
        return self

    def _problems(self) -> list[str]:
        try:
            method = get_method(self.merge_method)
        except RecipeError as error:
            return [f"merge_method: {error}"]
        problems = []
        if method.base == "required" and self.base_model is None:
            problems.append(f"base_model: `{method.name}` works on task vectors and needs the base model")
        if method.base == "first_model" and self.base_model is not None:
            listed = [entry.model for entry in self.models]
            if self.base_model not in listed:
                problems.append(
                    f"base_model: `{method.name}` goes from base_model to the other; list it in `models`"
                )
        count = len(self.task_models)
        if count < method.min_models or (method.max_models is not None and count > method.max_models):
            most = method.max_models
            wanted = (
                f"{method.min_models}"
                if most == method.min_models
                else f"{method.min_models} to {most or 'any'}"
            )
            besides = " besides the base" if method.base == "required" else ""
            problems.append(
                f"models: `{method.name}` takes {wanted} model(s){besides}, the recipe has {count}"
            )
        known = {entry.model for entry in self.models} | {self.base_model}
        if self.tokenizer_source == "union":
            problems.append("tokenizer_source: `union` is not supported yet; use `base` or one of the models")
        elif self.tokenizer_source not in {None, "base", *known}:
            problems.append(f"tokenizer_source: {self.tokenizer_source!r} is not one of the recipe's models")
        if self.buffers is not None and self.buffers not in known:
            problems.append(f"buffers: {self.buffers!r} is not one of the recipe's models")
        try:
            resolve_parameters(
                method, self.profile, self.parameters, [entry.parameters for _, entry in self.task_models]
            )
        except RecipeError as error:
            problems.extend(error.problems)
        return problems

    @property
    def task_models(self) -> tuple[tuple[int, ModelEntry], ...]:
        """``(index in the recipe, model)`` of the models that are merged.

        For a task-vector method the base, when it is listed too, has a zero task vector and is left out; for
        SLERP it comes first.
        """
        listed = tuple(enumerate(self.models))
        kind = get_method(self.merge_method).base
        if kind == "required":
            return tuple((index, entry) for index, entry in listed if entry.model != self.base_model)
        if kind == "first_model":
            return tuple(sorted(listed, key=lambda pair: pair[1].model != self.base_model))
        return listed

    @property
    def reference(self) -> str:
        """The model that decides names, shapes, config and tokenizer: the base, else the first."""
        return self.base_model or self.models[0].model

    @property
    def out_dtype_name(self) -> str | None:
        """Safetensors dtype of the merged weights, or ``None`` to keep each tensor's."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, without what was left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """The recipe as YAML, as it goes to the model card."""
        return yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)

    def canonical(self) -> str:
        """The one text of the recipe, for digests."""
        return canonical_json(self.to_json())


def parse_recipe(value: Any) -> Recipe:
    """Read a recipe from JSON-like data.

    :raises RecipeError: lists every problem, each with the field's name.
    """
    if not isinstance(value, dict):
        raise RecipeError("the recipe must be a mapping with `merge_method` and `models`")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(*validation_problems(error)) from error


def parse_yaml(text: str) -> Recipe:
    """Read a recipe from mergekit's YAML (or JSON, which is YAML).

    :raises RecipeError: the text is not YAML, or see :func:`parse_recipe`.
    """
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe is longer than {MAX_RECIPE_BYTES} bytes")
    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"the recipe is not valid YAML: {error}") from error
    if len(documents) != 1:
        raise RecipeError(
            f"the text holds {len(documents)} YAML documents; multi-stage merges are not supported yet"
        )
    return parse_recipe(documents[0])


def validation_problems(error: ValidationError) -> list[str]:
    """One sentence per problem, each beginning with the field's path."""
    problems: list[str] = []
    for item in error.errors(include_url=False):
        path = ".".join(str(step) for step in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, RecipeError):
            problems.extend(cause.problems)
            continue
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{path}: {message}" if path else message)
    return problems
