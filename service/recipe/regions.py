"""A recipe as planning reads it: regions of the output, their stretches, and where each parameter is looked for.

Whatever was written, `models`, `slices` or `modules`, becomes the same: a **region** is a module, or the whole
model; a **stretch** is what is merged in one way from one list of models: a slice's layers, or all of a region. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from service.recipe.entries import ModelEntry, SliceEntry, SourceEntry

DEFAULT_MODULES = ("default", "text_decoder")
"""Modules that stand for all tensors that no other module takes; the second only where no tensor is named so."""


@dataclass(frozen=True, slots=True)
class Section:
    """One place of a recipe where parameters are written."""

    path: str
    """Its place, as problems name it."""
    values: Mapping[str, Any]
    """What it says."""


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a stretch."""

    index: int
    """Its place in the list that it is written in; seeds its DARE masks."""
    model: str
    """Its name."""
    layers: tuple[int, int] | None
    """Which of its layers; ``None`` is all of the region."""
    own: Section
    """Its own parameters."""
    statistics: Mapping[str, str] = field(default_factory=dict)
    """What its entry names beside it (`fisher`, `gram`), by key."""

    @property
    def path(self) -> str:
        """Its place in the recipe."""
        return self.own.path.removesuffix(".parameters")


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is merged in one way from one list of models."""

    path: str
    """Where the list is."""
    base: str | None
    """The base model that holds here."""
    sources: tuple[Source, ...]
    """All that are listed."""
    shared: tuple[Section, ...]
    """Parameters for all of them: the slice's, the module's, the recipe's; the nearest first."""
    role: Literal["required", "optional", "first_model", "none"]
    """What the method makes of the base, as :attr:`workers.methods.base.Method.base` says."""

    @property
    def has_task_vectors(self) -> bool:
        """Whether models are merged by their differences to the base."""
        return self.role == "required" or (self.role == "optional" and self.base is not None)

    @property
    def base_source(self) -> Source | None:
        """The base, where it is listed."""
        return next((source for source in self.sources if source.model == self.base), None)

    @property
    def merged(self) -> tuple[Source, ...]:
        """The sources that are merged, in the order of summation.

        Where they are task vectors the base, when it is listed too, has a zero one and is left out; for SLERP it
        comes first.
        """
        base = self.base_source
        if self.has_task_vectors:
            is_base = None if base is None else (base.model, base.layers)
            return tuple(source for source in self.sources if (source.model, source.layers) != is_base)
        if self.role == "first_model":
            return tuple(sorted(self.sources, key=lambda source: source.model != self.base))
        return self.sources

    @property
    def reference(self) -> str:
        """The model that decides names, shapes and what no arithmetic is done on: the base, else the first."""
        if self.base is not None and (self.layers is None or self.base_source is not None):
            return self.base
        return self.sources[0].model

    @property
    def reference_layers(self) -> tuple[int, int] | None:
        """Which of the reference's layers; ``None`` is all of the region."""
        return None if self.layers is None else (self.base_source or self.sources[0]).layers

    @property
    def layers(self) -> int | None:
        """How many layers; ``None`` is all of the region."""
        at = self.sources[0].layers
        return None if at is None else at[1] - at[0]

    @property
    def sections(self) -> Iterator[tuple[Section, bool]]:
        """Every place where its parameters are written, and whether that is one model's own."""
        for source in self.sources:
            yield source.own, True
        for section in self.shared:
            yield section, False


@dataclass(frozen=True, slots=True)
class Region:
    """A module, or the whole model."""

    name: str | None
    """The module's name; ``None`` is the whole model."""
    stretches: tuple[Stretch, ...]
    """What it is made of: one for whole models, else its slices in the order of the output's layers."""

    @property
    def is_sliced(self) -> bool:
        """Whether it is made of slices."""
        return self.stretches[0].layers is not None


def region_of(
    name: str | None,
    path: str,
    models: tuple[ModelEntry, ...] | None,
    slices: tuple[SliceEntry, ...] | None,
    base: str | None,
    shared: tuple[Section, ...],
    role: Literal["required", "optional", "first_model", "none"],
) -> Region:
    """The region that lists ``models`` or ``slices``.

    :param path: what comes before the lists in the recipe: ``""``, or ``"modules.<name>."``.
    """
    if models is not None:
        whole = Stretch(f"{path}models", base, _sources(f"{path}models", models), shared, role)
        return Region(name, (whole,))
    stretches = []
    for number, entry in enumerate(slices or ()):
        at = f"{path}slices[{number}]"
        sources = _sources(f"{at}.sources", entry.sources)
        nearest = Section(f"{at}.parameters", entry.parameters)
        stretches.append(
            Stretch(f"{at}.sources", entry.base_model or base, sources, (nearest, *shared), role)
        )
    return Region(name, tuple(stretches))


def _sources(path: str, entries: tuple[ModelEntry, ...]) -> tuple[Source, ...]:
    return tuple(
        Source(
            index,
            entry.name,
            entry.layer_range if isinstance(entry, SourceEntry) else None,
            Section(f"{path}[{index}].parameters", entry.parameters),
            entry.statistics,
        )
        for index, entry in enumerate(entries)
    )
