"""Find a recipe's models, open them and plan the merge.

Headers, indexes and config.json are read, and those few tensors that no arithmetic is done on are compared
byte for byte; planning does no other I/O. Everything that can be wrong is looked for before anything is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar
from urllib.parse import quote

from service.adapters.fitting import adapted
from service.adapters.reading import Adapter
from service.planning.checkpoint import MAX_COPIED_BYTES, Checkpoint, WrittenFile, copied_files, written_file
from service.planning.matching import needs_digest
from service.planning.opening import content_digest, open_adapter, open_checkpoint, parallel
from service.planning.pairing import Inputs
from service.planning.places import overlap, resolve_model
from service.planning.plan import Plan, PlanOptions, draft_plan, with_stages
from service.planning.price import BASELINE_BYTES, Price
from service.planning.stages import Stage, draft_stage
from service.recipe import Graph, Recipe, graph_of
from service.vocabulary import Vocabularies, merge_vocabularies, owner_of
from workers.errors import PlanError, StoreError, StoreUnavailableError
from workers.store.base import ObjectInfo, ObjectStore
from workers.store.uris import name as base_name

COMPARED_BYTES = 1 << 30
"""Most bytes per model of tensors without arithmetic that planning reads to compare them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from."""

    graph: Graph
    """The recipe."""
    inputs: Inputs
    """The checkpoints of the merge that makes the output."""
    plan: Plan
    """The plan."""
    uris: Mapping[str, str]
    """Where everything is that the recipe names to be read."""
    tokenizer: Checkpoint
    """Whose tokenizer files go to the output."""
    checkpoints: tuple[Checkpoint, ...]
    """Every opened checkpoint, once: not the merges in between."""
    pins: dict[str, dict[str, str]]
    """ETags of all files that are merged, by the checkpoint or adapter that they are of."""
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files beside the weights that are written anew, by name."""
    left_out: frozenset[str] = frozenset()
    """Files that would be copied beside the weights, and say something else than these."""

    @property
    def copied(self) -> dict[str, ObjectInfo]:
        """The files that are copied beside the weights, by name."""
        found = copied_files(self.inputs.reference, self.tokenizer)
        return {
            name: info for name, info in found.items() if name not in self.texts and name not in self.left_out
        }

    @property
    def recipe(self) -> Recipe:
        """The recipe; of several documents the one that makes the output."""
        return self.graph.output


@dataclass(frozen=True)
class Outcome:
    """What came of planning: a plan, or everything that keeps it from being made."""

    planned: Planned | None
    """The plan, when nothing is wrong."""
    price: Price | None
    """What it costs; with problems, what those tensors cost that have none, if there are any."""
    problems: tuple[str, ...]
    """What is wrong with the recipe, its models and the place of the output."""
    away: tuple[str, ...]
    """Why some models could not be looked at just now, which says nothing about them."""

    def result(self) -> Planned:
        """The plan.

        :raises StoreUnavailableError: the store was out of reach.
        :raises PlanError: lists every problem.
        """
        if self.away:
            raise StoreUnavailableError("; ".join(sorted({*self.away, *self.problems})))
        if self.planned is None:
            raise PlanError(*self.problems)
        return self.planned


def plan_recipe(
    recipe: Recipe | Graph,
    options: PlanOptions,
    store: ObjectStore,
    model_roots: Mapping[str, str],
    baseline_bytes: int = BASELINE_BYTES,
    output: str | None = None,
) -> Planned:
    """Open every model of the recipe and plan the merge; ``output``, when given, must not overlap an input.

    :raises PlanError: lists every problem of every model.
    :raises StoreUnavailableError: the store is out of reach.
    """
    return examine(recipe, options, store, model_roots, baseline_bytes, output).result()


def examine(
    recipe: Recipe | Graph,
    options: PlanOptions,
    store: ObjectStore,
    model_roots: Mapping[str, str],
    baseline_bytes: int = BASELINE_BYTES,
    output: str | None = None,
) -> Outcome:
    """As :func:`plan_recipe`, but whatever keeps the merge from being run is part of the answer."""
    examination = _Examination(graph_of(recipe), options, store, baseline_bytes, output)
    examination.open(model_roots)
    return examination.plan()


@dataclass(frozen=True, slots=True)
class _Given:
    """What one merge is planned of."""

    recipe: Recipe
    """The merge, as far as its models have opened."""
    inputs: Inputs
    """Their checkpoints."""
    words: Vocabularies | None
    """What came of their vocabularies; ``None`` when they do not fit."""


class _Examination:
    """A recipe that is looked into, and what was found wrong so far."""

    def __init__(
        self, graph: Graph, options: PlanOptions, store: ObjectStore, baseline_bytes: int, output: str | None
    ) -> None:
        self._graph, self._options, self._store = graph, options, store
        self._baseline_bytes, self._output = baseline_bytes, output
        self._problems: list[str] = []
        self._away: list[str] = []
        self._uris: dict[str, str] = {}
        self._adapters: dict[str, Adapter] = {}
        # By places, with the merges in between; and by what the recipes call them, each under its adapter.
        self._checkpoints: dict[str, Checkpoint] = {}
        self._opened: dict[str, Checkpoint] = {}

    def open(self, model_roots: Mapping[str, str]) -> None:
        """Find and open everything that is read; see :func:`~service.planning.places.resolve_model`."""
        for place in self._graph.places:
            if (uri := self._attempt(partial(resolve_model, place, model_roots))) is not None:
                self._uris[place] = uri
        if self._output is not None:
            self._problems += overlap(self._output, self._uris.values())
        self._checkpoints = self._look(open_checkpoint, self._graph.checkpoints)
        self._adapters = self._look(open_adapter, self._graph.adapters)

    def plan(self) -> Outcome:
        """What comes of it."""
        stages = self._stages()
        last, plan = self._graph.output, None
        given = self._given(last)
        if given is not None:
            plan, misfits = draft_plan(given.recipe, given.inputs, self._options, self._baseline_bytes)
            self._problems += misfits
        if plan is not None:
            # Merges of the same bytes have the same files: what these hold is in their names.
            staged = {each.plan.shards[0].name: each.plan for each in stages if each.plan is not None}
            notices = [*self._graph.notices, *(notice for stage in stages for notice in stage.notices)]
            plan = with_stages(plan, list(staged.values()), notices)
        self._files(last)
        price = None if plan is None else plan.total
        tokenizer = self._tokenizer(last)
        words = None if given is None else given.words
        if not self._problems and not self._away:
            self._problems += self._unopened()
        if (
            plan is None
            or given is None
            or words is None
            or tokenizer is None
            or self._problems
            or self._away
        ):
            return Outcome(None, price, _once(self._problems), _once(self._away))
        read = {each.uri: each for name, each in self._checkpoints.items() if name in self._uris}
        pins = {each.uri: dict(each.pins) for each in read.values()}
        for own in self._adapters.values():  # a directory may hold both
            pins[own.uri] = {**pins.get(own.uri, {}), **own.pins}
        planned = Planned(
            graph=self._graph,
            inputs=given.inputs,
            plan=plan,
            uris=self._uris,
            tokenizer=tokenizer,
            checkpoints=tuple(read.values()),
            pins=pins,
            texts=_texts(copied_files(given.inputs.reference, tokenizer), words),
            left_out=words.left_out,
        )
        return Outcome(planned, price, (), ())

    def _attempt(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except PlanError as error:
            self._problems += error.problems
        except StoreUnavailableError as error:
            self._away.append(str(error))
        return None

    def _look(self, opening: Callable[[ObjectStore, str], T], places: Iterable[str]) -> dict[str, T]:
        """What opens of some places; each is opened once, however many names it has."""
        uris = {place: self._uris[place] for place in places if place in self._uris}
        distinct = list(dict.fromkeys(uris.values()))
        tried = parallel(lambda uri: self._attempt(lambda: opening(self._store, uri)), distinct)
        found = {uri: each for uri, each in zip(distinct, tried, strict=True) if each is not None}
        return {place: found[uri] for place, uri in uris.items() if uri in found}

    def _stages(self) -> list[Stage]:
        """The earlier merges that can be made."""
        last, stages = self._graph.output, []
        used = {model for model, _ in last.adapted.values()} if last.output_kind == "adapter" else set()
        for _, earlier in self._graph.earlier:
            if (given := self._given(earlier)) is None:
                continue
            files = self._files(earlier)
            if given.words is not None:
                files = _written(earlier.name or "", files, given.words)
            stage, misfits = draft_stage(
                given.recipe,
                given.inputs,
                files,
                self._options,
                self._baseline_bytes,
                self._output,
                whole=earlier.name in used,
            )
            self._problems += [f"{earlier.name}: {misfit}" for misfit in misfits]
            if stage is not None:
                stages.append(stage)
                self._checkpoints[stage.name] = stage.checkpoint
        return stages

    def _given(self, recipe: Recipe) -> _Given | None:
        """What a merge is planned of; ``None`` when none of its models has opened."""
        for name, (model, adapter) in recipe.adapted.items():
            if name in self._opened or (found := self._checkpoints.get(model)) is None:
                continue
            self._opened[name] = found
            if adapter is not None and (own := self._adapters.get(adapter)) is not None:
                self._opened[name] = self._attempt(partial(adapted, found, own)) or found
        for name in recipe.statistics:
            if (found := self._checkpoints.get(name)) is not None:
                self._opened[name] = found
        nearest = next((name for name in recipe.names if name in self._opened), None)
        if nearest is None:
            return None
        wanted, inputs = _completed(recipe, self._opened, self._uris, nearest)
        words = self._attempt(lambda: _vocabularies(self._store, wanted, inputs))
        inputs = replace(inputs, are_vocabularies_told=True) if words is None else words.inputs
        digested = self._attempt(lambda: _with_digests(self._store, wanted, inputs))
        return _Given(wanted, digested or replace(inputs, are_digested=False), words)

    def _unopened(self) -> list[str]:
        """Whatever was to be read and has not opened, when nothing else says why: no merge is made without it."""
        recipes = [*(earlier for _, earlier in self._graph.earlier), self._graph.output]
        names = (name for recipe in recipes for name in (*recipe.names, *recipe.statistics))
        return [
            f"{name}: could not be opened, and nothing says why" for name in names if name not in self._opened
        ]

    def _tokenizer(self, recipe: Recipe) -> Checkpoint | None:
        """Whose tokenizer goes to the output, as far as it has opened."""
        return self._opened.get(owner_of(recipe))

    def _files(self, recipe: Recipe) -> dict[str, ObjectInfo]:
        """The files that go beside a merge's weights; one that is too long is a problem."""
        reference, tokenizer = self._opened.get(recipe.reference), self._tokenizer(recipe)
        if reference is None or tokenizer is None:
            return {}
        files = copied_files(reference, tokenizer)
        self._problems += [
            f"{info.uri} has {info.size} bytes, more than the {MAX_COPIED_BYTES} of a file that is copied"
            for info in files.values()
            if info.size > MAX_COPIED_BYTES
        ]
        return files


def _once(said: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(said)))


def _written(merge: str, files: Mapping[str, ObjectInfo], words: Vocabularies) -> dict[str, ObjectInfo]:
    """The files that an earlier merge would have beside its weights."""
    kept = {name: info for name, info in files.items() if name not in words.left_out}
    return kept | {name: written_file(merge, name, text) for name, text in words.texts.items()}


def _texts(files: Mapping[str, ObjectInfo], words: Vocabularies) -> dict[str, bytes]:
    """The files that are written anew: by this merge, or by an earlier one whose files it takes."""
    taken = {name: info.text for name, info in files.items() if isinstance(info, WrittenFile)}
    return {name: text for name, text in taken.items() if name not in words.left_out} | dict(words.texts)


def _vocabularies(store: ObjectStore, recipe: Recipe, inputs: Inputs) -> Vocabularies:
    """What comes of the models' vocabularies.

    :raises PlanError: they do not fit together, or cannot be read.
    """
    try:
        return merge_vocabularies(store, recipe, inputs)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        raise PlanError(str(error)) from error


def _completed(
    recipe: Recipe, opened: Mapping[str, Checkpoint], uris: Mapping[str, str], nearest: str
) -> tuple[Recipe, Inputs]:
    """What to match when only the models in ``opened`` have opened, of which ``nearest`` stands for the reference.

    A model that has not is taken to be like the reference: it then fits, and costs what it would; a checkpoint of
    statistics, to have what the others have. Without the reference itself the others are compared among themselves,
    for what no reference could reconcile.
    """
    reference, compared_with = opened[nearest], None
    if nearest != recipe.reference:
        reference, compared_with = _like(reference, recipe.reference, uris), nearest
        unknown: dict[str, str] = {"missing_tensors": "base", "extra_tensors": "drop"}
        if recipe.extra_tensors == "drop":  # nobody needs to agree on what the reference may not have
            unknown |= {"mismatched_tensors": "base", "buffers": recipe.reference}
        recipe = recipe.model_copy(update=unknown)
    models = {name: opened.get(name) or _like(reference, name, uris) for name in recipe.names}
    models[recipe.reference] = reference
    away = frozenset(models.keys() - opened.keys())
    statistics = {name: opened[name] for name in recipe.statistics if name in opened}
    return recipe, Inputs(reference, models, compared_with, away, statistics=statistics)


def _like(checkpoint: Checkpoint, name: str, uris: Mapping[str, str]) -> Checkpoint:
    """A stand-in of the same tensors, whose bytes count as its own where they may differ."""
    uri = uris.get(name) or f"file:///{quote(name, safe='')}"  # who is nowhere is told apart, never read
    tensors = {
        key: replace(tensor, ref=replace(tensor.ref, uri=f"{uri}/{base_name(tensor.ref.uri)}"))
        if tensor.is_float
        else tensor
        for key, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _with_digests(store: ObjectStore, recipe: Recipe, inputs: Inputs) -> Inputs:
    """Digest the tensors that have to be equal, unless they are the same bytes of the same object."""
    names = needs_digest(recipe, inputs)
    if not names:
        return inputs
    known: dict[int, Checkpoint] = {}

    def digested(checkpoint: Checkpoint) -> Checkpoint:
        if id(checkpoint) not in known:
            tensors = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
            size = sum(tensor.ref.nbytes for tensor in tensors)
            if size > COMPARED_BYTES:
                raise PlanError(
                    f"{checkpoint.uri}: {size} bytes of {tensors[0].dtype} tensors such as {tensors[0].name} take no "
                    "arithmetic (a quantised checkpoint?): dequantise it first, or set `buffers:` to the model "
                    "whose values win"
                )
            found = parallel(lambda tensor: content_digest(store, tensor.ref), tensors)
            digests = {tensor.name: value for tensor, value in zip(tensors, found, strict=True)}
            known[id(checkpoint)] = replace(checkpoint, digests=digests)
        return known[id(checkpoint)]

    try:
        models = {name: digested(model) for name, model in inputs.models.items()}
        return replace(inputs, reference=digested(inputs.reference), models=models)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        raise PlanError(str(error)) from error
