"""The models that jobs of chaos merge, how, and what comes of it when nobody disturbs them."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from service.jobs.jobstore import JobStore
from service.jobs.record import JobState, new_job
from service.recipe import parse_documents
from service.running.runner import JobRunner
from service.running.work import Tools
from service.settings import Settings
from tests.chaos.known import header_of, put_known
from tests.checkpoints import Tensors, fine_tune, llama_config, llama_tensors, write_checkpoint
from tests.e2e.bench import LocalDriver
from workers.store import StoreSettings, join, open_stores
from workers.store.base import ObjectStore
from workers.store.stores import read_bytes

MIB = 1 << 20

EARLIER = "earlier"
"""What a recipe of two documents calls its first, which is staged in the store."""
POISON = "model.poison.weight"
"""A tensor that kills the worker that merges it; no part of another model names it."""
NONFINITE = "model.norm.weight"
"""The tensor with a NaN."""

SMALL = {"shard_bytes": 40_000}
"""Options that make some twenty shards of a small model, each a part."""
WIDE = {"shard_bytes": 12 * MIB, "part_bytes": 5 * MIB, "whole_tensor_bytes": 5 * MIB}
"""Options that split the embeddings of a wide model, and survey them first."""

_SMALL_SHAPE: dict[str, Any] = {"layers": 6, "hidden": 48, "heads": 2, "vocab": 400}
_WIDE_SHAPE: dict[str, Any] = {"layers": 1, "hidden": 64, "heads": 2, "vocab": 48_000}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge."""

    method: str
    """Merge method."""
    models: tuple[str, ...]
    """Names of the models; of a method that has one, the base is first."""
    options: Mapping[str, int]
    """Of the plan."""
    parameters: Mapping[str, Any]
    """Of the method."""
    more: Mapping[str, Any]
    """Other fields of the recipe."""
    earlier: Recipe | None = None
    """The merge before it that it calls :data:`EARLIER`."""

    def at(self, root: str, **instead: str) -> dict[str, Any]:
        """The recipe as it is submitted, with the models below ``root``, or ``instead``."""
        if self.earlier is not None:
            first = {"name": EARLIER, **self.earlier.at(root, **instead)}
            return {
                "documents": [first, replace(self, earlier=None).at(root, **instead, **{EARLIER: EARLIER})]
            }
        places = [instead.get(name, join(root, "models", name)) for name in self.models]
        has_base = self.method != "linear"
        document = {"merge_method": self.method, "parameters": dict(self.parameters), **self.more}
        if has_base:
            document["base_model"] = places[0]
        listed = places[1:] if has_base and self.method != "slerp" else places
        return {**document, "models": [{"model": place} for place in listed]}


RECIPES: Mapping[str, Recipe] = {
    "linear": Recipe("linear", ("base", "one", "two"), SMALL, {}, {}),
    "ties": Recipe("ties", ("base", "one", "two"), SMALL, {"density": 0.4}, {}),
    "dare": Recipe("dare_ties", ("base", "one"), SMALL, {"density": 0.5}, {"seed": 7}),
    "slerp": Recipe("slerp", ("base", "one"), SMALL, {"t": 0.3}, {}),
    "wide ties": Recipe("ties", ("wide", "wide-one"), WIDE, {"density": 0.5}, {}),
    "wide linear": Recipe("linear", ("wide", "wide-one"), WIDE, {}, {}),
    "staged ties": Recipe(
        "linear",
        (EARLIER, "two"),
        SMALL,
        {},
        {},
        Recipe("ties", ("base", "one"), SMALL, {"density": 0.4}, {}),
    ),
}
"""Merges that succeed."""

NONFINITE_RECIPE = Recipe("linear", ("base", "nan"), SMALL, {}, {})
POISON_RECIPE = Recipe("linear", ("poison", "poison-one"), SMALL, {}, {})


def digests(store: ObjectStore, prefix: str) -> dict[str, str]:
    """SHA-256 by name of everything below a prefix, whatever is hidden included."""
    return {
        info.uri[len(prefix) + 1 :]: hashlib.sha256(read_bytes(store, info.uri)).hexdigest()
        for info in store.list(prefix + "/")
    }


def write_models(store: ObjectStore, root: str, known: bool) -> None:
    """Write every model below ``root``.

    :param known: whether with the digests of their blocks.
    """
    small = llama_tensors(0, **_SMALL_SHAPE)
    wide = llama_tensors(1, **_WIDE_SHAPE)
    nan = {name: tensor.clone() for name, tensor in small.items()}
    nan[NONFINITE][3] = torch.nan
    poison = {**small, POISON: torch.ones(20_000)}  # as big as a shard: a part of its own
    models: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "base": (small, _SMALL_SHAPE),
        "one": (fine_tune(small, 1, 0.1), _SMALL_SHAPE),
        "two": (fine_tune(small, 2, 0.1), _SMALL_SHAPE),
        "nan": (nan, _SMALL_SHAPE),
        "poison": (poison, _SMALL_SHAPE),
        "poison-one": (fine_tune(poison, 3, 0.1), _SMALL_SHAPE),
        "wide": (wide, _WIDE_SHAPE),
        "wide-one": (fine_tune(wide, 4, 0.1), _WIDE_SHAPE),
    }
    for name, (tensors, shape) in models.items():
        put_model(store, join(root, "models", name), tensors, shape, known)


def put_model(
    store: ObjectStore, uri: str, tensors: Tensors, shape: dict[str, Any], known: bool = False
) -> None:
    """Write one model to a store."""
    with tempfile.TemporaryDirectory() as made:
        directory = write_checkpoint(Path(made), tensors, llama_config(**shape), shard_bytes=2 * MIB)
        if known:
            put_known(store, uri, directory)
            return
        for path in sorted(directory.iterdir()):
            store.put(join(uri, path.name), path.read_bytes())


def data_begins(store: ObjectStore, root: str) -> dict[str, int]:
    """Where the tensors begin in each weight file of the models below ``root``, by the key of the object."""
    found = (info.uri for info in store.list(join(root, "models") + "/"))
    return {
        uri.removeprefix("s3://").partition("/")[2]: header_of(read_bytes(store, uri)).data_start
        for uri in found
        if uri.endswith(".safetensors")
    }


def put_swapped(store: ObjectStore, uri: str, seed: int) -> None:
    """Write a model of the small shape, other for each seed."""
    put_model(store, uri, fine_tune(llama_tensors(0, **_SMALL_SHAPE), seed, 0.1), _SMALL_SHAPE)


class Undisturbed:
    """What each recipe makes when nobody disturbs it: made by a runner of this process, once, when it is asked for."""

    def __init__(self, redis_url: str, settings: StoreSettings, root: str) -> None:
        self._settings = Settings(
            redis_url=redis_url, namespace=f"undisturbed-{uuid.uuid4().hex}", store=settings
        )
        self._root = root
        self._store = open_stores(settings)
        self._known: dict[str, dict[str, str]] = {}

    def of(self, recipe: Recipe, **instead: str) -> dict[str, str]:
        """SHA-256 by file name of what a recipe makes, with models ``instead`` of its own."""
        document = recipe.at(self._root, **instead)
        key = json.dumps([document, dict(recipe.options)])
        if key not in self._known:
            output = join(self._root, "undisturbed", str(len(self._known)))
            self._make(document, recipe.options, output)
            self._known[key] = digests(self._store, output)
        return self._known[key]

    def _make(self, document: dict[str, Any], options: Mapping[str, int], output: str) -> None:
        chosen = {**self._settings.default_options.model_dump(mode="json"), **options}
        record = new_job(parse_documents(document).to_json(), output, chosen, time.time())
        with JobStore(self._settings.redis_url, self._settings.namespace) as jobs:
            jobs.create(record)
            lease = jobs.acquire(record.id, "undisturbed", 600.0)
            assert lease is not None
            driver: Any = LocalDriver()
            JobRunner(
                record, lease, Tools(self._settings, jobs, self._store, driver, threading.Event())
            ).run()
            done = jobs.get(record.id)
        assert done.state == JobState.SUCCEEDED, done.error
