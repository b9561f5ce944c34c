"""What a recipe is written of: models, slices and modules, each with parameters of its own. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.recipe_names import split_adapter

MAX_MODELS = 64
"""Most models of a recipe, and of one list in it."""

MAX_SLICES = 1024
"""Most slices of a recipe's list."""

MAX_MODULES = 16
"""Most modules of a recipe."""

MAX_LAYER = 1 << 16
"""Highest number of a layer."""


def _told_apart(value: str) -> str:
    split_adapter(value)
    return value


def _without_adapter(value: str) -> str:
    if split_adapter(value)[1] is not None:
        raise ValueError(f"{value!r} has an adapter of its own; name one place alone")
    return value


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"{list(value)} ends before it begins; layers count from 0, the end is not included")
    return value


ModelName = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_told_apart)]
"""`s3://bucket/prefix`, `file:///dir`, an absolute path, or a hub name that `model_roots` maps; or two of these with a
`+` between them: a model and the LoRA adapter on top of it."""

PlaceName = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_without_adapter)]
"""Where an adapter is, or a checkpoint of statistics, as a model's name says it."""

ParameterValues = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Parameters by name; nothing after the colon, as in many a recipe, is none."""

ModuleName = Annotated[str, Field(min_length=1, max_length=128)]
"""What the names of a module's tensors begin with or have between two dots, such as `vision_tower`; or `default`."""

LayerNumber = Annotated[int, Field(ge=0, le=MAX_LAYER, strict=True)]

LayerRange = Annotated[tuple[LayerNumber, LayerNumber], AfterValidator(_ordered)]
"""First layer, and one past the last."""


class Frozen(BaseModel):
    """Base of all that a recipe is written of: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class ModelEntry(Frozen):
    """One model of a recipe."""

    model: ModelName
    """Where the model is."""
    adapter: PlaceName | None = None
    """Where the LoRA adapter on top of it is, when `model` does not say so itself."""
    parameters: ParameterValues = Field(default_factory=dict)
    """The model's own parameters."""
    fisher: PlaceName | None = None
    """Where the diagonal of the model's Fisher is, for methods that weigh by it: a checkpoint of the same tensors."""
    gram: PlaceName | None = None
    """Where the Gram matrices of its linear layers' inputs are, for `regmean`: a checkpoint of tensors named as the
    layers' weights."""

    @property
    def statistics(self) -> dict[str, str]:
        """The checkpoints of statistics that it names, by the keys that name them."""
        named = {"fisher": self.fisher, "gram": self.gram}
        return {key: name for key, name in named.items() if name is not None}

    @model_validator(mode="after")
    def _one_adapter(self) -> ModelEntry:
        if self.adapter is not None and split_adapter(self.model)[1] is not None:
            raise ValueError(f"adapter: {self.model!r} has one already; a model has one of the two")
        return self

    @property
    def name(self) -> str:
        """What the model is called throughout the recipe, its adapter included."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"

    @property
    def places(self) -> tuple[str, str | None]:
        """The names of the model and of its adapter, by themselves."""
        return (self.model, self.adapter) if self.adapter is not None else split_adapter(self.model)


class SourceEntry(ModelEntry):
    """One model of a slice, and which of its layers."""

    layer_range: LayerRange
    """First layer, from 0, and one past the last; as many as the slice's other sources have."""


class SliceEntry(Frozen):
    """Consecutive layers of the output."""

    sources: tuple[SourceEntry, ...] = Field(min_length=1, max_length=MAX_MODELS)
    """The models whose layers are merged, in the order of summation."""
    base_model: ModelName | None = None
    """The base of these layers, in place of the recipe's; one of the sources."""
    parameters: ParameterValues = Field(default_factory=dict)
    """Parameters of these layers."""


class ModuleEntry(Frozen):
    """One part of a model: a vision tower, an encoder, or all that other modules leave (`default`)."""

    models: tuple[ModelEntry, ...] | None = Field(default=None, min_length=1, max_length=MAX_MODELS)
    """The models, whole."""
    slices: tuple[SliceEntry, ...] | None = Field(default=None, min_length=1, max_length=MAX_SLICES)
    """Or their layers."""
    parameters: ParameterValues = Field(default_factory=dict)
    """Parameters of this module."""

    @model_validator(mode="after")
    def _one_of(self) -> ModuleEntry:
        if (self.models is None) == (self.slices is None):
            raise ValueError("a module has either `models` or `slices`")
        return self
