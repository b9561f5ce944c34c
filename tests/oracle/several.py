"""Random recipes of several documents, beside ``mergekit-multi``: which uses which, by which methods, in which dtypes.

Each is a function of its number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from service.recipe_names import DOCUMENTS, with_names
from tests.checkpoints import read_checkpoint
from tests.oracle.compare import Distance, distance
from tests.oracle.language import DEPTH

MOST_ROUNDED_APART = 1e-3
"""Share of results that may be beyond the bound where an earlier merge is rounded to bfloat16: a float32 result on the
other side of the middle of two steps is a step apart from there on."""

GROUPS = ("llama", "llama-bfloat16", "gpt2")
FIRST = ("linear", "task_arithmetic", "slerp", "nuslerp", "model_stock", "passthrough", "slices")
"""What the first documents do: their tensors are computed on the way, staged or copied."""
SECOND = ("linear", "task_arithmetic", "slerp", "slices")


@dataclass(frozen=True, eq=False)
class Several:
    """One random recipe of several documents."""

    name: str
    """What it is called on disk."""
    documents: tuple[dict[str, Any], ...]
    """The documents, in the order that they are written in; models are called ``group/model``."""
    group: str
    """Its inputs."""
    is_rounded: bool
    """Whether an earlier merge is rounded to bfloat16."""

    def placed(self, root: Path, **more: Any) -> list[dict[str, Any]]:
        """The documents with their models below ``root``."""
        placed = with_names({DOCUMENTS: list(self.documents)}, lambda _, name: str(root / name))
        return [document | more for document in placed[DOCUMENTS]]


def several(number: int) -> Several:
    """Random recipe ``number``."""
    choose = random.Random(number)
    group = GROUPS[number % len(GROUPS)]
    is_rounded = group != "llama-bfloat16" and choose.random() < 0.3
    first = {"name": "first", **_document(choose, FIRST[number % len(FIRST)], group, "a")}
    first |= {"dtype": "float32"} | ({"out_dtype": "bfloat16"} if is_rounded else {})
    second = {
        "name": "second",
        **_document(choose, choose.choice(SECOND), group, "first"),
        "dtype": "float32",
    }
    documents = [first, second]
    if choose.random() < 0.5:
        models = [_entry(choose, name) for name in ("second", f"{group}/c", "first")]
        documents.append({"merge_method": "linear", "models": models, "dtype": "float32"})
    else:
        del second["name"]
    choose.shuffle(documents)
    return Several(f"several-{number}", tuple(documents), group, is_rounded)


def _document(choose: random.Random, method: str, group: str, of: str) -> dict[str, Any]:
    """A merge of ``of``, a model or a document, with models of the group."""
    one = of if of == "first" else f"{group}/{of}"
    two, base = f"{group}/b", one if of == "first" else f"{group}/base"
    match method:
        case "slices":
            ranges = ([0, DEPTH // 2], [DEPTH // 2 - 1, DEPTH - 1])  # as many layers as before
            slices = [
                {"sources": [{**_entry(choose, name), "layer_range": at} for name in (one, two)]}
                for at in ranges
            ]
            return {"merge_method": "linear", "slices": slices}
        case "passthrough":
            return {"merge_method": method, "models": [{"model": one}]}
        case "slerp":
            parameters = {"t": round(choose.random(), 2)}
            return {
                "merge_method": method,
                "base_model": one,
                "models": _bare(one, two),
                "parameters": parameters,
            }
        case "task_arithmetic":
            models = [_entry(choose, name) for name in (two, f"{group}/c")]
            return {"merge_method": method, "base_model": base, "models": models}
        case "model_stock":
            return {"merge_method": method, "base_model": base, "models": _bare(one, two, f"{group}/c")}
        case _:
            return {"merge_method": method, "models": [_entry(choose, one), _entry(choose, two)]}


def _entry(choose: random.Random, model: str) -> dict[str, Any]:
    return {"model": model, "parameters": {"weight": round(choose.uniform(0.2, 1.0), 3)}}


def _bare(*models: str) -> list[dict[str, Any]]:
    return [{"model": model} for model in models]


@dataclass(frozen=True, slots=True)
class SeveralCompared:
    """One recipe's outcome."""

    recipe: Several
    """The recipe."""
    distance: Distance
    """All tensors together."""
    problem: str | None
    """What else is not as it has to be."""


def compare_several(root: Path, recipe: Several, ours: Path, theirs: Path) -> SeveralCompared:
    """Compare both tools' results, tensor by tensor."""
    one, two = read_checkpoint(ours), read_checkpoint(theirs)
    if one.keys() != two.keys():
        return SeveralCompared(recipe, Distance(), f"only one has {sorted(one.keys() ^ two.keys())[:4]}")
    largest: dict[torch.Size, float] = {}
    for name in ("base", "a", "b", "c"):
        for tensor in read_checkpoint(root / recipe.group / name).values():
            largest[tensor.shape] = max(largest.get(tensor.shape, 0.0), float(tensor.abs().max()))
    found, problem = Distance(), None
    for name, tensor in one.items():
        if (tensor.shape, tensor.dtype) != (two[name].shape, two[name].dtype):
            return SeveralCompared(recipe, Distance(), f"{name} is {tensor.dtype} and {two[name].dtype}")
        scale = torch.full(tensor.shape, largest[tensor.shape])  # of that shape, since layers may have moved
        found += distance(tensor, two[name], scale, torch.zeros(tensor.shape, dtype=torch.bool))
    configs = [json.loads((directory / "config.json").read_text()) for directory in (ours, theirs)]
    for key in ("num_hidden_layers", "n_layer"):
        if configs[0].get(key) != configs[1].get(key):
            problem = f"{key} is {configs[0].get(key)} and {configs[1].get(key)}"
    return SeveralCompared(recipe, found, problem)


def several_problems(results: Iterable[SeveralCompared]) -> Iterator[str]:
    """One sentence for everything that is not as it has to be."""
    for each in results:
        allowed = MOST_ROUNDED_APART * each.distance.elements if each.recipe.is_rounded else 0
        if each.problem is not None:
            yield f"{each.recipe.name}: {each.problem}"
        elif each.distance.over > allowed or not each.distance.elements:
            yield f"{each.recipe.name}: {each.distance.over} of {each.distance.elements} elements beyond the bound"


def several_table(results: Iterable[SeveralCompared]) -> str:
    """A row for those in float32 throughout, and one for those with an earlier merge in bfloat16."""
    rows = []
    for is_rounded, what in ((False, "float32"), (True, "an earlier merge in bfloat16")):
        of = [each.distance for each in results if each.recipe.is_rounded is is_rounded]
        found = reduce(add, of, Distance())
        same = 1 - found.differing / max(1, found.elements)
        rows.append(
            f"| {what} | {len(of)} | {found.elements:,} | {same:.2%} | {found.over} | {found.worst:.2f} |"
        )
    return "\n".join(rows)
