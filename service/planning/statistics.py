"""What a method has to know of each model's data (`fisher`, `gram`): the tensors that go with the models'. Pure.

Such a checkpoint has tensors with the names of its model's. How a recipe names it is said in ``service.recipe``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from service.planning.checkpoint import TIED_NAMES, StoredTensor
from service.planning.pairing import Inputs
from service.recipe import Recipe, Source
from workers.methods import get_method
from workers.methods.base import Method, Parameters, Statistic
from workers.task import DTYPE_BYTES, Arithmetic, JSONValue, ModelInput, TensorRef


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that is wrong with a statistic of one tensor."""

    what: str
    """What is wrong with it."""
    place: str
    """The checkpoint, by its name in the recipe."""
    remedy: str
    """What to do about it."""
    how: str = ""
    """What is peculiar to this tensor."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One model's tensor, as it is merged."""

    source: Source
    """Whose it is."""
    names: tuple[str, ...]
    """What it may be called where its statistic is: its own name first."""
    tensor: StoredTensor
    """The tensor."""


@dataclass(frozen=True, slots=True)
class Found:
    """The statistics that go with one output tensor."""

    refs: tuple[TensorRef, ...]
    """One for each model; none where they all lack it."""
    misfits: tuple[Misfit, ...]
    """Everything that is wrong with them."""


class Statistics:
    """Finds the statistics of a recipe's tensors."""

    def __init__(self, recipe: Recipe, inputs: Inputs, kind: Statistic) -> None:
        self._inputs = inputs
        self._kind = kind
        self._parameters = get_method(recipe.merge_method).parameters
        self._may_lack = kind.is_sparse or (kind.without is not None and recipe.missing_tensors == "base")
        self._resolved: dict[int, Parameters] = {}

    def of(self, models: Sequence[Merged], parameters: dict[str, JSONValue]) -> Found:
        """Those of one output tensor.

        :param parameters: those of the merge, as a resolver gives them: the same object for the same ones.
        """
        if id(parameters) not in self._resolved:
            self._resolved[id(parameters)] = self._parameters.model_validate(parameters)
        shape = self._kind.shape(self._resolved[id(parameters)], models[0].tensor.shape)
        found: list[TensorRef] = []
        lacking: list[str] = []
        misfits: list[Misfit] = []
        for model in models:
            place = model.source.statistics.get(self._kind.name, "")
            checkpoint = self._inputs.statistics.get(place)
            if checkpoint is None:
                continue  # it could not be opened: what the others have is taken
            name = next((name for name in model.names if name in checkpoint.tensors), None)
            if name is None:
                lacking.append(place)
                continue
            stored = checkpoint.tensors[name]
            found.append(stored.ref)
            misfits += self._misfits(stored, shape, place)
        away = len(models) - len(found) - len(lacking)
        if lacking and (found or not self._may_lack):
            remedy = f"give every model a `{self._kind.name}` that has them"
            if not found and self._kind.without is not None:
                remedy += f", or set `missing_tensors: base` to merge them by `{self._kind.without}`"
            misfits += [Misfit("lacks tensors of its model", place, remedy) for place in lacking]
        if away and not misfits and (found or not self._may_lack) and shape is not None:
            return Found(self._stand_ins(models, shape), ())
        return Found(() if misfits or lacking else tuple(found), tuple(misfits))

    def _misfits(self, stored: StoredTensor, shape: tuple[int, ...] | None, place: str) -> Iterator[Misfit]:
        if not stored.is_float:
            yield Misfit("no arithmetic is done on its dtypes", place, "", f" ({stored.dtype})")
        elif shape is None:
            yield Misfit(
                "tensors of models that can have none", place, "leave them out", f" {list(stored.shape)}"
            )
        elif stored.shape != shape:
            how = f" {list(stored.shape)}, not {list(shape)}"
            yield Misfit("shape is not what the models' tensors ask for", place, "", how)

    def _stand_ins(self, models: Sequence[Merged], shape: tuple[int, ...]) -> tuple[TensorRef, ...]:
        """What the statistics would be where some could not be opened: as many bytes as their models' dtypes take."""
        made = []
        for model in models:
            place = "/".join((model.source.statistics.get(self._kind.name, ""), model.names[0]))
            dtype = model.tensor.dtype
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
            made.append(TensorRef(f"file:///{quote(place, safe='')}", "", 0, nbytes, dtype))
        return tuple(made)


def strangers(recipe: Recipe, inputs: Inputs, kind: Statistic) -> Iterator[tuple[str, str, list[str]]]:
    """Each checkpoint of statistics with tensors that its model lacks: its name, the model's and theirs."""
    seen = set()
    for region in recipe.regions:
        for stretch in region.stretches:
            for source in stretch.merged:
                place = source.statistics.get(kind.name, "")
                checkpoint = inputs.statistics.get(place)
                if checkpoint is None or source.model in inputs.stand_ins or (place, source.model) in seen:
                    continue
                seen.add((place, source.model))
                known = inputs.models[source.model].tensors
                names = [name for name in checkpoint.tensors if name not in known and name not in TIED_NAMES]
                if names:
                    yield place, source.model, names


def arithmetic_without(method: Method, arithmetic: Arithmetic) -> Arithmetic:
    """The arithmetic of a tensor that no model has a statistic of, by the method that merges such ones."""
    kind = method.statistic
    if kind is None or kind.without is None:
        return arithmetic
    other = get_method(kind.without)
    return replace(
        arithmetic,
        method=other.name,
        parameters=_as(other.parameters, arithmetic.parameters),
        models=tuple(
            ModelInput(model.index, model.ref, _as(other.model_parameters, model.parameters))
            for model in arithmetic.models
        ),
        shape=() if other.whole is None else arithmetic.shape,
    )


def _as(kind: type[Parameters], values: Mapping[str, Any]) -> dict[str, JSONValue]:
    """These values as parameters of another method, which has its defaults for what they do not say."""
    names = {field.alias or name for name, field in kind.model_fields.items()}
    taken = {name: value for name, value in values.items() if name in names}
    return kind.model_validate(taken).model_dump(mode="json", by_alias=True)


def surveyed(arithmetic: Arithmetic) -> Arithmetic:
    """What a survey reads of an arithmetic: all but the statistics, which no pass has a use for."""
    if not arithmetic.statistics:
        return arithmetic
    return replace(arithmetic, models=tuple(replace(model, statistic=None) for model in arithmetic.models))
