"""Which tensors of which models meet in each output tensor, by their names: regions, slices and layers. Pure.

Whole models are paired name by name. Of a slice, layer i of the output takes layer ``start + i`` of each source;
what lies outside the layers comes from the first slice's sources where it feeds the first layer, and else from the
last slice's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from service.planning.checkpoint import Checkpoint, StoredTensor
from service.planning.layers import Stacks, is_before, main_stacks, position, stacks_of
from service.planning.modules import Modules, modules_of
from service.recipe import Recipe, Region, Source, Stretch
from workers.safetensors_format import MAX_TENSORS

_SHOWN = 4
"""How many stacks a problem lists."""


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoints of a recipe."""

    reference: Checkpoint
    """The base, else the first model: decides config and tokenizer."""
    models: Mapping[str, Checkpoint]
    """Every model, by its name in the recipe."""
    compared_with: str | None = None
    """The model that stands in for a reference that did not open, by its name in the recipe."""
    stand_ins: frozenset[str] = frozenset()
    """The models that did not open, and are taken to be like another."""
    are_digested: bool = True
    """Whether the tensors that no arithmetic is done on could be read to compare them."""
    statistics: Mapping[str, Checkpoint] = field(default_factory=dict)
    """The checkpoints of statistics that opened, by their names in the recipe."""
    notices: tuple[str, ...] = ()
    """What came up while they were looked at."""
    are_vocabularies_told: bool = False
    """Whether something about their vocabularies is a problem already, so that their sizes are none of their own."""

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All of them; one may be there twice."""
        return (self.reference, *self.models.values(), *self.statistics.values())


@dataclass(frozen=True, slots=True)
class Bound:
    """A stretch and the checkpoints that it is made of."""

    stretch: Stretch
    """The stretch."""
    reference: Checkpoint
    """What decides names, shapes and what no arithmetic is done on."""
    against: str
    """The reference's name."""
    sources: tuple[tuple[Source, Checkpoint], ...]
    """What is merged, in the order of summation."""


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor and what meets in it."""

    name: str
    """What it is called in the output."""
    bound: Bound
    """Whose it is."""
    position: float
    """Where its layer lies among those of its stretch, from 0 to 1; 0 outside of layers."""
    tensor: StoredTensor
    """The reference's."""
    elsewhere: tuple[str, ...] | None = None
    """What each of ``bound.sources`` calls it, where that is not the same."""

    @property
    def names(self) -> tuple[str, ...]:
        """What each of ``bound.sources`` calls it."""
        return self.elsewhere or (self.name,) * len(self.bound.sources)


@dataclass(frozen=True, slots=True)
class Slicing:
    """The layers of a region that is made of slices."""

    stack: str
    """What the names of its layers' tensors begin with."""
    depth: int
    """How many the model has that config.json is taken from."""
    origins: tuple[tuple[Checkpoint, int], ...]
    """For each layer of the output: the reference that it is taken from, and its number there."""


@dataclass
class Pairing:
    """All rows, and what does not fit by name alone."""

    rows: list[Row] = field(default_factory=list)
    """The output's tensors, in its order."""
    extras: list[tuple[Bound, Source, Checkpoint, list[str]]] = field(default_factory=list)
    """Tensors of sources that their references lack."""
    slicings: list[Slicing] = field(default_factory=list)
    """The regions whose layers are numbered anew."""
    problems: list[str] = field(default_factory=list)
    """What makes pairing impossible."""
    notices: list[str] = field(default_factory=list)
    """What the user should know."""


def pair(recipe: Recipe, inputs: Inputs) -> Pairing:
    """Pair the tensors of a recipe's models."""
    regions, main = recipe.regions, recipe.reference
    modules, problems = modules_of(regions, inputs.reference.tensors.keys())
    found = Pairing(problems=problems)
    known: dict[int, Stacks] = {}

    def stacks(checkpoint: Checkpoint) -> Stacks:
        if id(checkpoint) not in known:
            known[id(checkpoint)] = stacks_of(checkpoint.tensors)
        return known[id(checkpoint)]

    for number, region in enumerate(regions):
        bounds = [_bound(stretch, main, inputs) for stretch in region.stretches]
        names = _NamesOf(modules, number)
        if region.is_sliced:
            _Sliced(region, bounds, names, recipe, inputs, found, stacks).pair()
        else:
            _whole(bounds[0], names, found, stacks)
    return found


class _NamesOf:
    """The names of a region's tensors, for each checkpoint once."""

    def __init__(self, modules: Modules, region: int) -> None:
        self._modules = modules
        self._region = region
        self._known: dict[int, list[str]] = {}

    def __call__(self, checkpoint: Checkpoint) -> list[str]:
        if id(checkpoint) not in self._known:
            self._known[id(checkpoint)] = self._modules.of(self._region, checkpoint.tensors)
        return self._known[id(checkpoint)]


def _bound(stretch: Stretch, main: str, inputs: Inputs) -> Bound:
    """Find a stretch's checkpoints; ``main`` is the name of the recipe's reference."""
    against = stretch.reference
    if against == main:
        reference, against = inputs.reference, inputs.compared_with or against
    else:
        reference = inputs.models[against]
    return Bound(
        stretch, reference, against, tuple((source, inputs.models[source.model]) for source in stretch.merged)
    )


def _whole(bound: Bound, names: _NamesOf, found: Pairing, stacks: Callable[[Checkpoint], Stacks]) -> None:
    reference = bound.reference
    layers = stacks(reference)
    found.rows += [
        Row(name, bound, layers.position(name), reference.tensors[name]) for name in names(reference)
    ]
    for source, checkpoint in bound.sources:
        if checkpoint is not reference:
            extra = [name for name in names(checkpoint) if name not in reference.tensors]
            found.extras.append((bound, source, checkpoint, extra))


class _Sliced:
    """A region that is made of slices."""

    def __init__(
        self,
        region: Region,
        bounds: list[Bound],
        names: _NamesOf,
        recipe: Recipe,
        inputs: Inputs,
        found: Pairing,
        stacks: Callable[[Checkpoint], Stacks],
    ) -> None:
        self.region, self.bounds, self.names = region, bounds, names
        self.recipe, self.inputs, self.found, self.stacks = recipe, inputs, found, stacks
        self.stack = ""
        self.rests: dict[int, dict[int, list[str]]] = {}

    def pair(self) -> None:
        """Add the region's rows, or what keeps them from being known."""
        stack = self._chosen()
        if stack is None:
            return
        self.stack = stack
        fitting = [self._fits(bound) for bound in self.bounds]  # every one, for its problems
        if not all(fitting):
            return
        if sum(bound.stretch.layers or 0 for bound in self.bounds) * self._widest() > MAX_TENSORS:
            self.found.problems.append(
                f"{self.path}: the output would have more than the {MAX_TENSORS} tensors that are written"
            )
            return
        first, last = self.bounds[0], self._closing()
        self._outside(first, is_before)
        output = 0
        for bound in self.bounds:
            for offset in range(bound.stretch.layers or 0):
                self._layer(bound, offset, output)
                output += 1
        self._outside(last, lambda name: not is_before(name))
        origins = [
            (bound.reference, layer)
            for bound in self.bounds
            for layer in range(*(bound.stretch.reference_layers or (0, 0)))
        ]
        depth = self.stacks(self.inputs.reference).depths.get(stack, 0)
        self.found.slicings.append(Slicing(stack, depth, tuple(origins)))
        if {source.model for source in first.stretch.sources} != {
            source.model for source in last.stretch.sources
        }:
            self.found.notices.append(
                f"{self.path}: embeddings and whatever else feeds the first layer come from {first.stretch.path}, "
                f"norms and heads from {last.stretch.path}"
            )

    @property
    def path(self) -> str:
        """Where the recipe lists the slices."""
        return self.bounds[0].stretch.path.rpartition("[")[0]

    def _closing(self) -> Bound:
        """What norms and heads are made of: the last slice's sources; mergekit takes no more than the first has."""
        last, most = self.bounds[-1], len(self.bounds[0].stretch.sources)
        count = len(last.stretch.sources)
        if count <= most:
            return last
        if self.recipe.profile != "mergekit":
            self.found.notices.append(
                f"{last.stretch.path}: norms and heads are made of all {count}, where mergekit takes the first "
                f"{most}, as many as the first slice has; with `profile: mergekit` so does Mergemill"
            )
            return last
        fewer = replace(last.stretch, sources=last.stretch.sources[:most])
        if last.stretch.base_source is not None and fewer.base_source is None:
            return last  # mergekit refuses this
        return _bound(fewer, self.recipe.reference, self.inputs)

    def _chosen(self) -> str | None:
        """The stack that the slices' ranges of layers are of."""
        reference = self.bounds[0].reference
        stacks = self.stacks(reference)
        places = (stacks.place(name) for name in self.names(reference))
        found = main_stacks(
            (place.stack for place in places if place is not None), stacks.depths, reference.config
        )
        if len(found) == 1:
            return found[0]
        if found:
            told = ", ".join(f"`{stack}` ({stacks.depths[stack]} layers)" for stack in found[:_SHOWN])
            self.found.problems.append(
                f"{self.path}: layers could be those of {told}: say which under `modules`, one module for each part "
                f"of the model, such as `{found[0].split('.', maxsplit=1)[0]}`"
            )
        else:
            self.found.problems.append(
                f"{self.path}: no tensor of {self.bounds[0].against} has the number of a layer in its name"
            )
        return None

    def _fits(self, bound: Bound) -> bool:
        """Whether every source has the layers that are asked of it."""
        fits = True
        for source in bound.stretch.sources:
            checkpoint = self._checkpoint(source)
            depth = self.stacks(checkpoint).depths.get(self.stack, 0)
            if source.layers is None or source.layers[1] <= depth:
                continue
            fits = False
            if source.model not in self.inputs.stand_ins:
                self.found.problems.append(
                    f"{source.path}.layer_range: {list(source.layers)} goes beyond the {depth} layers "
                    f"(`{self.stack}`) of {source.model}"
                )
        return fits

    def _checkpoint(self, source: Source) -> Checkpoint:
        return self.inputs.models[source.model]

    def _widest(self) -> int:
        """Most tensors of a layer."""
        return max(len(rests) for bound in self.bounds for rests in self._layers(bound.reference).values())

    def _layers(self, checkpoint: Checkpoint) -> dict[int, list[str]]:
        """What follows the number in the names of each layer's tensors."""
        if id(checkpoint) not in self.rests:
            layers: dict[int, list[str]] = {}
            stacks = self.stacks(checkpoint)
            for name in self.names(checkpoint):
                place = stacks.place(name)
                if place is not None and place.stack == self.stack:
                    layers.setdefault(place.layer, []).append(place.rest)
            self.rests[id(checkpoint)] = layers
        return self.rests[id(checkpoint)]

    def _layer(self, bound: Bound, offset: int, output: int) -> None:
        """Add the rows of one layer of the output."""
        start = (bound.stretch.reference_layers or (0, 0))[0]
        starts = [(source.layers or (0, 0))[0] for source, _ in bound.sources]
        rests = self._layers(bound.reference)[start + offset]
        at = position(offset, bound.stretch.layers or 0)
        self.found.rows += [
            Row(
                f"{self.stack}{output}.{rest}",
                bound,
                at,
                bound.reference.tensors[f"{self.stack}{start + offset}.{rest}"],
                tuple(f"{self.stack}{first + offset}.{rest}" for first in starts),
            )
            for rest in rests
        ]
        known = set(rests)
        for (source, checkpoint), first in zip(bound.sources, starts, strict=True):
            if (checkpoint, first) != (bound.reference, start):
                more = [rest for rest in self._layers(checkpoint)[first + offset] if rest not in known]
                extra = [f"{self.stack}{first + offset}.{rest}" for rest in more]
                self.found.extras += [(bound, source, checkpoint, extra)] if extra else []

    def _outside(self, bound: Bound, takes: Callable[[str], bool]) -> None:
        """Add the rows of those tensors outside the layers that ``takes`` says."""
        reference = bound.reference
        names = [name for name in self._others(reference) if takes(name)]
        self.found.rows += [Row(name, bound, 0.0, reference.tensors[name]) for name in names]
        for source, checkpoint in bound.sources:
            if checkpoint is not reference:
                extra = [
                    name for name in self._others(checkpoint) if takes(name) and name not in reference.tensors
                ]
                self.found.extras.append((bound, source, checkpoint, extra))

    def _others(self, checkpoint: Checkpoint) -> Iterator[str]:
        """The region's tensors outside the layers."""
        stacks = self.stacks(checkpoint)
        for name in self.names(checkpoint):
            place = stacks.place(name)
            if place is None or place.stack != self.stack:
                yield name
