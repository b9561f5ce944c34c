"""The recipe: what the user wants, as mergekit's YAML or the same as JSON. Pure.

Reference for the language: mergekit's documented configuration format. Keys that Mergemill does not serve
yet are refused by name, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from service.yaml_text import load_documents
from workers.errors import RecipeError
from workers.methods import METHODS, get_method
from workers.methods.resolve import resolve_parameters
from workers.task import canonical_json

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The recipe's dtype names, and safetensors' names for them."""

MAX_MODELS = 64
"""Most models of a recipe."""

MAX_RECIPE_CHARACTERS = 1 << 18
"""Longest recipe text that is read."""

Profile = Literal["paper", "mergekit"]

_NOT_YET = {
    "slices": "layer slicing is not supported yet; list whole models under `models`",
    "modules": "multi-module recipes are not supported yet; merge one module at a time",
    "tokenizer": "building tokenizers is not supported yet; `tokenizer_source` may name `base` or a model",
    "chat_template": "setting a chat template is not supported yet; it is copied with the tokenizer",
}

_ELSEWHERE = {"slices", "modules"}
"""Keys of mergekit's under which a recipe may name its models in place of `models`."""

_NO_MODELS = {"models: Field required", "models: Tuple should have at least 1 item after validation, not 0"}
"""How Pydantic says that there are none."""

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
               "mismatched_tensors", "buffers")  # fmt: skip
"""Fields without which the rest of a recipe still makes sense."""


def _no_adapter(value: str) -> str:
    if "+" in value and not value.startswith(("s3://", "file://", "/")):
        raise ValueError(f"{value!r}: LoRA adapters (`model+adapter`) are not supported yet")
    return value


ModelName = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_no_adapter)]
"""`s3://bucket/prefix`, `file:///dir`, an absolute path, or a hub name that `model_roots` maps."""

ParameterValues = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Parameters by name; nothing after the colon, as in many a recipe, is none."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class ModelEntry(_Frozen):
    """One model of a recipe."""

    model: ModelName
    """Where the model is."""
    parameters: ParameterValues = Field(default_factory=dict)
    """The model's own parameters."""


class Recipe(_Frozen):
    """What the user wants. Frozen; planning never rewrites it."""

    merge_method: str
    """Name of the merge method."""
    base_model: ModelName | None = None
    """The common ancestor of the models, for methods that have one."""
    models: tuple[ModelEntry, ...] = Field(min_length=1, max_length=MAX_MODELS)
    """The models, in the order of summation."""
    parameters: ParameterValues = Field(default_factory=dict)
    """Global parameters, and defaults for the models' own."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Output dtype when `out_dtype` is not set. The arithmetic is always float32."""
    out_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the merged weights; each tensor keeps the base's (or first model's) when neither is set."""
    tokenizer_source: str | None = None
    """Whose tokenizer files to copy: `base`, or one of the recipe's models. The base's by default."""
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

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problems = list(self._problems())
        if problems:
            raise RecipeError(*problems)
        return self

    def _problems(self) -> list[str]:
        problems = self._name_problems()
        try:
            method = get_method(self.merge_method)
        except RecipeError as error:
            return [*error.problems, *problems]
        if method.base == "required" and self.base_model is None:
            problems.append(f"base_model: `{method.name}` works on task vectors and needs the base model")
        if method.base == "first_model" and self.base_model is not None:
            listed = [entry.model for entry in self.models]
            if self.base_model not in listed:
                problems.append(
                    f"base_model: `{method.name}` goes from base_model to the other; list it in `models`"
                )
        count = len(self.task_models)
        most = method.max_models
        if count < method.min_models or (most is not None and count > most):
            wanted = str(most) if most == method.min_models else f"{method.min_models} to {most or 'any'}"
            besides = " besides the base" if method.base == "required" else ""
            problems.append(
                f"models: `{method.name}` takes {wanted} model(s){besides}, the recipe has {count}"
            )
        try:  # the base, too, where it is listed: what it says has no effect, but a typo is one
            resolve_parameters(
                method, self.profile, self.parameters, [entry.parameters for entry in self.models]
            )
        except RecipeError as error:
            problems.extend(error.problems)
        return problems

    def _name_problems(self) -> list[str]:
        """What refers to a model that is not there."""
        problems = []
        known = {entry.model for entry in self.models} | {self.base_model}
        if self.tokenizer_source == "union":
            problems.append("tokenizer_source: `union` is not supported yet; use `base` or one of the models")
        elif self.tokenizer_source not in {None, "base", *known}:
            problems.append(f"tokenizer_source: {self.tokenizer_source!r} is not one of the recipe's models")
        if self.buffers is not None and self.buffers not in known:
            problems.append(f"buffers: {self.buffers!r} is not one of the recipe's models")
        return problems

    @property
    def task_models(self) -> tuple[tuple[int, ModelEntry], ...]:
        """``(index in the recipe, model)`` of the models that are merged.

        For a task-vector method the base, when it is listed too, has a zero task vector and is left out; for
        SLERP it comes first.
        """
        listed = tuple(enumerate(self.models))
        kind = get_method(self.merge_method).base
        if self.has_task_vectors:
            return tuple((index, entry) for index, entry in listed if entry.model != self.base_model)
        if kind == "first_model":
            return tuple(sorted(listed, key=lambda pair: pair[1].model != self.base_model))
        return listed

    @property
    def has_task_vectors(self) -> bool:
        """Whether models are merged by their differences to the base."""
        kind = get_method(self.merge_method).base
        return kind == "required" or (kind == "optional" and self.base_model is not None)

    @property
    def reference(self) -> str:
        """The model that decides names, shapes, config and tokenizer: the base, else the first."""
        return self.base_model or self.models[0].model

    @property
    def names(self) -> list[str]:
        """Every model that the recipe names, once, the reference first."""
        return list(dict.fromkeys([self.reference, *(entry.model for entry in self.models)]))

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
    listed = value.get("models")
    if isinstance(listed, list) and len(listed) > MAX_MODELS:  # before each of them is looked into
        raise RecipeError(f"models: {len(listed)} models, more than the {MAX_MODELS} that are read")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        problems = _recipe_problems(error)
        rest = _without_wrong_fields(value, error)
    try:  # the checks across fields only run when every field is well-formed
        Recipe.model_validate(rest)
    except ValidationError as error:
        problems += _recipe_problems(error)
    if (
        listed or _ELSEWHERE & value.keys()
    ):  # there are models; what keeps them from being read is said already
        problems = [problem for problem in problems if problem not in _NO_MODELS]
    raise RecipeError(*_presentable(problems))


def renamed(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with its models called otherwise."""
    fields = {
        field: names.get(value, value)
        for field in ("base_model", "tokenizer_source", "buffers")
        if (value := getattr(recipe, field)) is not None
    }
    models = tuple(
        entry.model_copy(update={"model": names.get(entry.model, entry.model)}) for entry in recipe.models
    )
    return recipe.model_copy(update={**fields, "models": models})


def parse_yaml(text: str) -> Recipe:
    """Read a recipe from mergekit's YAML (or JSON, which is YAML).

    :raises RecipeError: see :func:`load_yaml` and :func:`parse_recipe`.
    """
    return parse_recipe(load_yaml(text))


def load_yaml(text: str) -> Any:
    """The data that a recipe's YAML stands for.

    :raises RecipeError: the text is too long, or is not one YAML document.
    """
    if len(text) > MAX_RECIPE_CHARACTERS:
        raise RecipeError(f"the recipe is longer than {MAX_RECIPE_CHARACTERS} characters")
    documents = load_documents(text)
    if not documents:
        raise RecipeError("the recipe is empty")
    if len(documents) != 1:
        raise RecipeError(
            f"the text holds {len(documents)} YAML documents; multi-stage merges are not supported yet"
        )
    return documents[0]


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
    for number, item in enumerate(error.errors(include_url=False)):
        if item["type"] != "extra_forbidden" or number >= _MOST_PROBLEMS:
            continue
        *parents, key = item["loc"]
        if not parents and key in _NOT_YET:
            problems[number] = f"{key}: {_NOT_YET[str(key)]}"
            continue
        known = ModelEntry.model_fields if parents else Recipe.model_fields
        path, what = problems[number].rpartition(": ")[0], "a model" if parents else "a recipe"
        hint = "; write it under `parameters`" if key in _PARAMETERS else key_hint(key, known)
        problems[number] = f"{path}: is not a key of {what}{hint}"
    return problems


def key_hint(key: object, known: Iterable[str]) -> str:
    """What to add to the news that ``key`` is none of the ``known`` ones: which was meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(str(key)[:64], names, n=1)
    return f"; did you mean `{near[0]}`?" if near else f" ({', '.join(names)})"


def _without_wrong_fields(value: Mapping[Any, Any], error: ValidationError) -> dict[Any, Any]:
    """The recipe without unknown keys and malformed options."""
    items = error.errors(include_url=False)
    unknown = {item["loc"] for item in items if item["type"] == "extra_forbidden"}
    wrong = unknown | {item["loc"] for item in items if item["loc"][:1] in {(name,) for name in _OWN_FIELDS}}
    rest = {key: inner for key, inner in value.items() if (key,) not in wrong}
    models = rest.get("models")
    if isinstance(models, list | tuple):
        rest["models"] = [
            {key: inner for key, inner in entry.items() if ("models", index, key) not in unknown}
            if isinstance(entry, dict)
            else entry
            for index, entry in enumerate(models)
        ]
    return rest


def _presentable(problems: list[str]) -> list[str]:
    """Each problem once, none endless, and not thousands of them."""
    distinct = list(dict.fromkeys(problems))
    shown = [
        text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
        for text in distinct[:_MOST_PROBLEMS]
    ]
    more = len(distinct) - len(shown)
    return [*shown, f"and {more} more problem(s)"] if more else shown
