"""Find a recipe's models, open them and plan the merge.

Headers, indexes and config.json are read, and those few tensors that no arithmetic is done on are compared
byte for byte; planning does no other I/O. Everything that can be wrong is looked for before anything is reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import quote

from service.checkpoint import MAX_COPIED_BYTES, Checkpoint, copied_files
from service.matching import needs_digest
from service.opening import content_digest, open_checkpoint, parallel
from service.pairing import Inputs
from service.plan import Plan, PlanOptions, draft_plan, with_stages
from service.price import BASELINE_BYTES, Price
from service.recipe import Graph, Recipe, graph_of
from service.stages import Stage, draft_stage
from workers.errors import PlanError, StoreError, StoreUnavailableError
from workers.store.base import ObjectInfo, ObjectStore
from workers.store.uris import from_path, join, normalise, to_path
from workers.store.uris import name as base_name

COMPARED_BYTES = 1 << 30
"""Most bytes per model of tensors without arithmetic that planning reads to compare them."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")

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
    """Where each model named in the recipe is."""
    tokenizer: Checkpoint
    """Whose tokenizer files go to the output."""
    checkpoints: tuple[Checkpoint, ...]
    """Every opened checkpoint, once: not the merges in between."""

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


def is_hub_name(name: str) -> bool:
    """Whether a model's name in a recipe is a hub's, such as ``org/name@revision``, not a place."""
    return (
        _HUB_NAME.fullmatch(name) is not None
        and not name.startswith(".")
        and ".." not in re.split("[/@]", name)
    )


def resolve_model(name: str, model_roots: Mapping[str, str]) -> str:
    """Where a model named in a recipe is: a normalised URI.

    ``model_roots`` maps a hub name, or a prefix of hub names ending in ``/`` (``""`` for all), to a URI prefix;
    the longest match wins. A revision is appended as ``@revision``.

    :raises PlanError: a relative path, or a hub name that nothing maps.
    """
    if name.startswith(("s3://", "file://", "/")):
        try:
            return normalise(name)
        except StoreError as error:
            raise PlanError(f"{name}: {error}") from error
    if not is_hub_name(name):
        raise PlanError(
            f"{name!r} is neither s3://bucket/prefix, file:///directory, an absolute path nor a hub name "
            "(a relative path would mean the server's disk)"
        )
    bare, _, revision = name.partition("@")
    prefixes = [root for root in model_roots if (root.endswith("/") or not root) and bare.startswith(root)]
    key = next((key for key in (name, bare) if key in model_roots), max(prefixes, key=len, default=None))
    if key is None:
        raise PlanError(
            f"{name!r} is a hub name that this service does not know, and nothing is downloaded from hubs: name "
            "the place of its files, or have the service find it there, for example with "
            f'MERGEMILL_MODEL_ROOTS=\'{{"{bare}": "s3://bucket/{bare}"}}\''
        )
    try:
        root = normalise(model_roots[key])
        if key == name:
            return root
        if key == bare:
            return f"{root}@{quote(revision) if root.startswith('file:') else revision}"
        return join(root, *name[len(key) :].split("/"))
    except StoreError as error:
        raise PlanError(f"{name}: MERGEMILL_MODEL_ROOTS maps {key!r} to no place: {error}") from error


def overlap(output: str, inputs: Iterable[str]) -> list[str]:
    """What is wrong with an output that equals, lies inside or contains an input."""
    problems = []
    ours = _real(output)
    for uri in dict.fromkeys(inputs):
        theirs = _real(uri)
        if theirs == ours or ours.startswith(theirs + "/") or theirs.startswith(ours + "/"):
            problems.append(f"output {output} overlaps the input {uri}: choose another place")
    return problems


def _real(uri: str) -> str:
    """The place itself, without the symbolic links that may lead to it."""
    return from_path(os.path.realpath(to_path(uri))) if uri.startswith("file:") else uri


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
    problems: list[str] = []
    away: list[str] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except PlanError as error:
            problems.extend(error.problems)
        except StoreUnavailableError as error:
            away.append(str(error))
        return None

    graph = graph_of(recipe)
    resolved = {name: attempt(lambda name=name: resolve_model(name, model_roots)) for name in graph.names}  # type: ignore[misc]
    uris = {name: uri for name, uri in resolved.items() if uri is not None}
    if output is not None:
        problems.extend(overlap(output, uris.values()))
    distinct = list(dict.fromkeys(uris.values()))
    tried = parallel(lambda uri: attempt(lambda: open_checkpoint(store, uri)), distinct)
    by_uri = dict(zip(distinct, tried, strict=True))
    opened = {name: found for name, uri in uris.items() if (found := by_uri[uri]) is not None}

    def matched(one: Recipe) -> tuple[Recipe, Inputs] | None:
        nearest = next((name for name in one.names if name in opened), None)
        if nearest is None:
            return None
        wanted, inputs = _completed(one, opened, uris, nearest)
        return wanted, attempt(lambda: _with_digests(store, wanted, inputs)) or replace(
            inputs, are_digested=False
        )

    stages: list[Stage] = []
    for _, earlier in graph.earlier:
        if (given := matched(earlier)) is None:
            continue
        stage, misfits = draft_stage(
            *given, _files(earlier, opened, problems), options, baseline_bytes, output
        )
        problems.extend(f"{earlier.name}: {misfit}" for misfit in misfits)
        if stage is not None:
            stages.append(stage)
            opened[stage.name] = stage.checkpoint
    last, plan = graph.output, None
    if (given := matched(last)) is not None:
        plan, own = draft_plan(*given, options, baseline_bytes)
        problems.extend(own)
    if plan is not None:
        staged = [stage.plan for stage in stages if stage.plan is not None]
        notices = [*graph.notices, *(notice for stage in stages for notice in stage.notices)]
        plan = with_stages(plan, staged, notices)
    price = None if plan is None else plan.total
    _files(last, opened, problems)
    tokenizer = _tokenizer(last, opened)
    if plan is None or given is None or tokenizer is None or problems or away:
        return Outcome(None, price, tuple(sorted(set(problems))), tuple(sorted(set(away))))
    places = tuple(checkpoint for checkpoint in by_uri.values() if checkpoint is not None)
    return Outcome(Planned(graph, given[1], plan, uris, tokenizer, places), price, (), ())


def _tokenizer(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Checkpoint | None:
    """Whose tokenizer goes to the output, as far as it has opened."""
    source = recipe.tokenizer_source
    return opened.get(recipe.reference if source in {None, "base"} else str(source))


def _files(recipe: Recipe, opened: Mapping[str, Checkpoint], problems: list[str]) -> dict[str, ObjectInfo]:
    """The files that go beside a merge's weights; one that is too long is a problem."""
    reference, tokenizer = opened.get(recipe.reference), _tokenizer(recipe, opened)
    if reference is None or tokenizer is None:
        return {}
    files = copied_files(reference, tokenizer)
    problems.extend(
        f"{info.uri} has {info.size} bytes, more than the {MAX_COPIED_BYTES} of a file that is copied"
        for info in files.values()
        if info.size > MAX_COPIED_BYTES
    )
    return files


def _completed(
    recipe: Recipe, opened: Mapping[str, Checkpoint], uris: Mapping[str, str], nearest: str
) -> tuple[Recipe, Inputs]:
    """What to match when only the models in ``opened`` have opened, of which ``nearest`` stands for the reference.

    A model that has not is taken to be like the reference: it then fits, and costs what it would. Without the
    reference itself the others are compared among themselves, for what no reference could reconcile.
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
    return recipe, Inputs(reference, models, compared_with, away)


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
