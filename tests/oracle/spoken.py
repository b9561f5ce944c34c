"""Random recipes compared: every tensor, its place and the depth that config.json says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from service.planning.pairing import pair
from service.planning.plan import PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_recipe
from service.recipe.resolve import Resolver
from tests.checkpoints import Tensors, read_checkpoint
from tests.oracle.compare import RELATIVE, Distance, cancelled, distance, scale_of, undefined_by_trim
from tests.oracle.exact import Nearness, nearness
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
    nearness: Nearness = field(default_factory=Nearness)
    """Where weights of a normalised sum cancel, how far both tools are from float64."""


def compare_spoken(root: Path, spoken: Spoken, ours: Path, theirs: Path) -> Compared:
    """Compare both tools' results, tensor by tensor."""
    one, two = read_checkpoint(ours), read_checkpoint(theirs)
    if one.keys() != two.keys():
        return Compared(spoken, Distance(), f"only one has {sorted(one.keys() ^ two.keys())[:4]}")
    found, near, problem = Distance(), Nearness(), None
    for each in _tensors(root, spoken):
        ours_here, theirs_here = one[each.name], two[each.name]
        if (ours_here.shape, ours_here.dtype) != (theirs_here.shape, theirs_here.dtype):
            return Compared(spoken, Distance(), f"{each.name} is {ours_here.dtype} and {theirs_here.dtype}")
        inputs = (spoken.method, each.parameters, each.base, each.models, each.own)
        is_rounded = ours_here.dtype == torch.bfloat16
        step = theirs_here.double().abs() * ROUNDED / RELATIVE if is_rounded else 0
        undefined = torch.zeros(each.base.shape, dtype=torch.bool)
        if spoken.method == "ties":
            undefined = undefined_by_trim(each.base, each.models, [own["density"] for own in each.own])
        found += distance(ours_here, theirs_here, scale_of(*inputs) + step, undefined)
        if each.is_cancelling(spoken.method) and not is_rounded:
            near += nearness(ours_here, theirs_here, *inputs)
    exact = GROUPS[spoken.group] == torch.float32 and spoken.recipe.get("out_dtype")
    if exact and found.differing > MOST_ROUNDED_APART * found.elements:
        problem = f"{found.differing} of {found.elements} bfloat16 results differ"
    depths = [_depth(directory) for directory in (ours, theirs)]
    if depths[0] != depths[1]:
        problem = f"config.json has {depths[0]} layers, mergekit's {depths[1]}"
    return Compared(spoken, found, problem, near)


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


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What meets in one output tensor."""

    name: str
    """What it is called."""
    parameters: Mapping[str, Any]
    """Those of the whole merge."""
    base: torch.Tensor
    """The reference's."""
    models: Sequence[torch.Tensor]
    """Those that are merged."""
    own: Sequence[Mapping[str, Any]]
    """Their parameters."""

    def is_cancelling(self, method: str) -> bool:
        """Whether it is divided by a sum of weights of both signs."""
        weights = [each["weight"] for each in self.own] if method == "task_arithmetic" else []
        return bool(self.parameters.get("normalize")) and cancelled(weights) > 1


def _tensors(root: Path, spoken: Spoken) -> Iterator[_Tensor]:
    """Every output tensor, and what it is made of."""
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
        yield _Tensor(row.name, resolved.shared, base, models, resolved.models)


def _depth(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    return next((int(config[key]) for key in DEPTH_KEYS if key in config), DEPTH)
