"""What is compared: small Llama-shaped inputs, and recipes that mergekit reads too.

Models are named ``group/model``; :func:`with_models` turns the names into what a tool wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import Tensors, fine_tune, llama_config, llama_tensors, write_checkpoint

Recipe = dict[str, Any]

TUNED = ("a", "b", "c")
SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 256, "key_value_heads": 2, "intermediate": 176}
GROUPS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "tied": (torch.float32, True),
}
"""Dtype of the inputs, and whether their embeddings are tied."""


@dataclass(frozen=True, eq=False)
class Case:
    """One recipe, run by both tools on the same inputs."""

    name: str
    """What it is called in the report and on disk."""
    recipe: Recipe
    """The recipe, without a profile."""
    group: str
    """Its inputs: a key of ``GROUPS``."""

    @property
    def method(self) -> str:
        """The recipe's merge method."""
        return str(self.recipe["merge_method"])


def _case(
    name: str,
    method: str,
    models: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any] | None = None,
    *,
    group: str = "float32",
    base: str | None = "base",
) -> Case:
    listed = [{"model": f"{group}/{model}", "parameters": dict(own)} for model, own in models.items()]
    recipe: Recipe = {"merge_method": method, "models": listed, "dtype": "float32"}
    if base is not None:
        recipe["base_model"] = f"{group}/{base}"
    if parameters:
        recipe["parameters"] = dict(parameters)
    return Case(name, recipe, group)


def _weighted(*weights: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": weight} for name, weight in zip(TUNED, weights, strict=False)}


def _sparse(*pairs: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {
        name: {"weight": weight, "density": density}
        for name, (weight, density) in zip(TUNED, pairs, strict=False)
    }


SPARSE = _sparse((0.3, 0.5), (0.5, 0.2), (1.0, 0.8))
WEIGHTED = _weighted(0.2, 0.5, 0.9)
APART: dict[str, dict[str, float]] = {"a": {}, "far": {}}

PARITY = (
    _case("ties", "ties", _sparse((1, 0.2), (1, 0.2), (1, 0.2))),
    _case("ties-weights", "ties", SPARSE),
    _case("ties-sum", "ties", SPARSE, {"normalize": False}),
    _case("ties-lambda", "ties", SPARSE, {"lambda": 0.7}),
    _case("ties-lambda-sum", "ties", SPARSE, {"lambda": 1.5, "normalize": False, "int8_mask": True}),
    _case("ties-negative", "ties", _sparse((1, 0.5), (-0.4, 0.5), (0.3, 0.9))),
    _case("ties-dense", "ties", _sparse((0.6, 1), (0.4, 1))),
    _case("ties-sparse", "ties", _sparse((1, 0.001), (1, 0.01))),
    _case("ties-empty", "ties", _sparse((1, 0), (1, 0.5))),
    _case("ties-one", "ties", _sparse((0.8, 0.3))),
    _case("ties-bfloat16", "ties", SPARSE, group="bfloat16"),
    _case("ties-bfloat16-sum", "ties", SPARSE, {"normalize": False}, group="bfloat16"),
    _case("ties-tied", "ties", SPARSE, group="tied"),
    _case("linear", "linear", _weighted(1, 1, 1), base=None),
    _case("linear-weights", "linear", WEIGHTED, base=None),
    _case("linear-sum", "linear", WEIGHTED, {"normalize": False}, base=None),
    _case("linear-negative", "linear", _weighted(1.5, -0.5), base=None),
    _case("linear-bfloat16", "linear", WEIGHTED, group="bfloat16", base=None),
    _case("slerp-0", "slerp", APART, {"t": 0}, base="a"),
    _case("slerp-0.1", "slerp", APART, {"t": 0.1}, base="a"),
    _case("slerp-0.5", "slerp", APART, {"t": 0.5}, base="a"),
    _case("slerp-0.9", "slerp", APART, {"t": 0.9}, base="a"),
    _case("slerp-1", "slerp", APART, {"t": 1}, base="a"),
    _case("slerp-near", "slerp", {"a": {}, "b": {}}, {"t": 0.3}, base="a"),
    _case("slerp-second", "slerp", APART, {"t": 0.3}, base="far"),
    _case("slerp-bfloat16", "slerp", APART, {"t": 0.3}, group="bfloat16", base="a"),
    _case("task_arithmetic", "task_arithmetic", _weighted(1, 1, 1)),
    _case("task_arithmetic-lambda", "task_arithmetic", WEIGHTED, {"lambda": 0.4}),
    _case("task_arithmetic-negative", "task_arithmetic", _weighted(1, -0.7)),
    _case("task_arithmetic-mean", "task_arithmetic", WEIGHTED, {"normalize": True}),
    _case("task_arithmetic-bfloat16", "task_arithmetic", WEIGHTED, group="bfloat16"),
    _case("passthrough", "passthrough", {"b": {}}, base=None),
    _case("passthrough-bfloat16", "passthrough", {"b": {}}, group="bfloat16", base=None),
    _case("passthrough-tied", "passthrough", {"b": {}}, group="tied", base=None),
)
"""Every tensor of these has to agree within the bound."""

ROUNDED = tuple(
    Case(f"{case.name}-rounded", {**case.recipe, "dtype": "bfloat16"}, case.group)
    for case in PARITY
    if case.group == "bfloat16"
)
"""The same with ``dtype: bfloat16``, where mergekit rounds every intermediate: for information."""

DARE = tuple(
    _case(f"{method}-{density}", method, _sparse((1.0, density)))
    for method in ("dare_linear", "dare_ties")
    for density in (0.1, 0.3, 0.5, 0.7, 0.9)
)
"""One model of weight 1 each, so that the mask can be read off the result."""


def write_inputs(root: Path) -> None:
    """Write every model of every group: some in one file, some in shards, ``c`` with a layer of its base."""
    for group, (dtype, tied) in GROUPS.items():
        base = llama_tensors(1, dtype=dtype, tied=tied, **SHAPE)
        config = llama_config(dtype=dtype, tied=tied, **SHAPE)
        models: dict[str, Tensors] = {"base": base, "far": llama_tensors(2, dtype=dtype, tied=tied, **SHAPE)}
        models |= {name: fine_tune(base, 10 + i, (i + 1) * 1e-3) for i, name in enumerate(TUNED)}
        models["c"] |= {name: base[name] for name in base if ".layers.0." in name}
        for number, (name, tensors) in enumerate(models.items()):
            shard_bytes = (None, 50_000, 200_000)[number % 3]
            write_checkpoint(root / group / name, tensors, config, shard_bytes)


def with_models(recipe: Recipe, rename: Callable[[str], str]) -> Recipe:
    """The recipe with its models named by ``rename``."""
    renamed = recipe | {"models": [entry | {"model": rename(entry["model"])} for entry in recipe["models"]]}
    if "base_model" in recipe:
        renamed["base_model"] = rename(recipe["base_model"])
    return renamed
