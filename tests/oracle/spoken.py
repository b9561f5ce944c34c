"""Random recipes compared: every tensor, its place and the depth that config.json says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch

from service.pairing import pair
from service.plan import PlanOptions
from service.planning import plan_recipe
from service.recipe import parse_recipe
from service.recipe.resolve import Resolver
from tests.checkpoints import Tensors, read_checkpoint
from tests.oracle.compare import RELATIVE, Distance, distance, scale_of, undefined_by_trim
from tests.oracle.language import DEPTH, FEATURES, GROUPS, METHODS, Spoken
from workers.store.local import LocalStore

ROUNDED = 2.0**-7
"""Relative step of bfloat16: where both round once, float32 results on two sides of a step end a step apart."""

MOST_ROUNDED_APART = 1e-3
"""Share of bfloat16 results of float32 inputs that may be a step apart. Averages of bfloat16 inputs often lie in the
very middle of two steps, where the last float32 rounding decides."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer")


@dataclass(frozen=True, slots=True)
class Compared:
    """One random recipe's outcome."""

    spoken: Spoken
    """The recipe."""
    distance: Distance
    """All tensors together."""
    problem: str | None
    """What else is not as it has to be."""


def compare_spoken(root: Path, spoken: Spoken, ours: Path, theirs: Path) -> Compared:
    """Compare both tools' results, tensor by tensor."""
    one, two = read_checkpoint(ours), read_checkpoint(theirs)
    if one.keys() != two.keys():
        return Compared(spoken, Distance(), f"only one has {sorted(one.keys() ^ two.keys())[:4]}")
    found, problem = Distance(), None
    for name, scale, undefined in _scales(root, spoken):
        if (one[name].shape, one[name].dtype) != (two[name].shape, two[name].dtype):
            return Compared(spoken, Distance(), f"{name} is {one[name].dtype} and {two[name].dtype}")
        step = two[name].double().abs() * ROUNDED / RELATIVE if one[name].dtype == torch.bfloat16 else 0
        found += distance(one[name], two[name], scale + step, undefined)
    exact = GROUPS[spoken.group] == torch.float32 and spoken.recipe.get("out_dtype")
    if exact and found.differing > MOST_ROUNDED_APART * found.elements:
        problem = f"{found.differing} of {found.elements} bfloat16 results differ"
    depths = [_depth(directory) for directory in (ours, theirs)]
    if depths[0] != depths[1]:
        problem = f"config.json has {depths[0]} layers, mergekit's {depths[1]}"
    return Compared(spoken, found, problem)


def spoken_problems(results: Iterable[Compared]) -> Iterator[str]:
    """One sentence for everything that is not as it has to be."""
    for result in results:
        if result.problem is not None:
            yield f"{result.spoken.name}: {result.problem}"
        elif result.distance.over or not result.distance.elements:
            yield f"{result.spoken.name}: {result.distance.over} of {result.distance.elements} beyond the bound"


def spoken_table(results: Iterable[Compared]) -> str:
    """How many recipes have each method and feature, and how far the worst of them is off."""
    found = list(results)
    lines = []
    for what, names in (("method", METHODS), ("feature", FEATURES)):
        for name in names:
            own = [
                r
                for r in found
                if (r.spoken.method == name if what == "method" else name in r.spoken.features)
            ]
            together = reduce(add, (r.distance for r in own), Distance())
            same = 1 - together.differing / max(1, together.elements)
            lines.append(
                f"| {what} | {name} | {len(own)} | {together.elements:,} | {same:.2%} | {together.over} "
                f"| {together.worst:.2f} |"
            )
    return "\n".join(lines)


def _scales(root: Path, spoken: Spoken) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """For every output tensor what the bound is relative to, and which elements are nobody's promise."""
    recipe = parse_recipe(spoken.placed(root, profile="mergekit"))
    planned = plan_recipe(recipe, PlanOptions(worker_memory_bytes=1 << 40), LocalStore(), {})
    known: dict[str, Tensors] = {}

    def tensor(uri: str, name: str) -> torch.Tensor:
        if uri not in known:
            known[uri] = read_checkpoint(Path(uri.removeprefix("file://")))
        return known[uri][name]

    resolver = Resolver(recipe)
    for row in pair(recipe, planned.inputs).rows:
        resolved = resolver.resolve(row.bound.stretch, row.name, row.names, row.position)
        base = tensor(row.bound.reference.uri, row.tensor.name)
        models = [
            tensor(checkpoint.uri, own)
            for own, (_, checkpoint) in zip(row.names, row.bound.sources, strict=True)
        ]
        own: list[Mapping[str, float]] = [dict(each) for each in resolved.models]
        undefined = torch.zeros(base.shape, dtype=torch.bool)
        if spoken.method == "ties":
            undefined = undefined_by_trim(base, models, [each["density"] for each in own])
        yield row.name, scale_of(spoken.method, resolved.shared, base, models, own), undefined


def _depth(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    return next((int(config[key]) for key in DEPTH_KEYS if key in config), DEPTH)
