"""Where the results lie, and what they are compared by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.checkpoints import Tensors, read_checkpoint
from tests.oracle.cases import Case, Recipe, with_models
from tests.oracle.compare import (
    Distance,
    Mask,
    distance,
    mask_of,
    scale_of,
    undefined_by_band,
    undefined_by_importance,
    undefined_by_trim,
    undefined_by_variance,
)
from tests.oracle.exact import Nearness, nearness

DTYPE_KEYS = {"dtype", "torch_dtype"}


@dataclass(frozen=True, slots=True)
class Bench:
    """A directory with the inputs and both tools' results."""

    root: Path
    """The directory."""

    def model(self, name: str) -> Path:
        """A model's directory."""
        return self.root / "inputs" / name

    def ours(self, case: Case, profile: str | None = "mergekit") -> Path:
        """Our result under a profile."""
        return self.root / "ours" / f"{case.name}-{profile or 'default'}"

    def theirs(self, case: Case) -> Path:
        """mergekit's result."""
        return self.root / "theirs" / case.name

    def recipe(self, case: Case, **more: Any) -> Recipe:
        """The recipe with its models' paths, and what is added for us."""
        return with_models(case.recipe, lambda name: str(self.model(name))) | more

    def compare(self, case: Case) -> dict[str, Distance]:
        """How far each tensor of the two results is apart.

        :raises ValueError: names, shapes or dtypes differ.
        """
        ours, theirs = read_checkpoint(self.ours(case)), read_checkpoint(self.theirs(case))
        if ours.keys() != theirs.keys():
            raise ValueError(f"{case.name}: only one has {sorted(ours.keys() ^ theirs.keys())}")
        found = {}
        for name, base, models, own in self._inputs(case):
            one, two = ours[name], theirs[name]
            if (one.shape, one.dtype) != (two.shape, two.dtype):
                raise ValueError(f"{case.name}: {name} is {one.dtype}{one.shape} and {two.dtype}{two.shape}")
            scale = scale_of(case.method, case.recipe.get("parameters", {}), base, models, own)
            found[name] = distance(one, two, scale, _undefined(case, base, models, own))
        return found

    def stored(self, case: Case) -> Distance:
        """How many elements of two results differ that were stored as bfloat16, but for what is nobody's promise.

        Beyond the bound are those that are not the tool's own float32 result, rounded once to the nearest: what is
        left are float32 results on two sides of the middle of two steps.
        """
        plain = Case(case.name.removesuffix("-stored"), case.recipe, case.group)
        ours, theirs, our_wide, their_wide = (
            read_checkpoint(place)
            for place in (self.ours(case), self.theirs(case), self.ours(plain), self.theirs(plain))
        )
        found = Distance()
        for name, base, models, own in self._inputs(case):
            keep = ~_undefined(case, base, models, own)
            one, two = ours[name][keep], theirs[name][keep]
            if {one.dtype, two.dtype} != {torch.bfloat16}:
                raise ValueError(f"{case.name}: {name} is {one.dtype} and {two.dtype}")
            rounded = (one == our_wide[name][keep].bfloat16()) & (two == their_wide[name][keep].bfloat16())
            differing, over = int((one != two).sum()), int((~rounded).sum())
            found += Distance(one.numel(), differing, over, 0.0, int((~keep).sum()))
        return found

    def nearness(self, case: Case) -> Nearness:
        """How far both results are from what float64 makes of the recipe."""
        ours, theirs = read_checkpoint(self.ours(case)), read_checkpoint(self.theirs(case))
        parameters = case.recipe.get("parameters", {})
        return sum(
            (
                nearness(ours[name], theirs[name], case.method, parameters, base, models, own)
                for name, base, models, own in self._inputs(case)
            ),
            start=Nearness(),
        )

    def mask(self, case: Case, directory: Path, rescale: str) -> Mask:
        """What a DARE merge of one model kept."""
        merged = read_checkpoint(directory)
        density = case.recipe["models"][0]["parameters"]["density"]
        masks = (
            mask_of(merged[name], base, models[0], density, rescale)
            for name, base, models, _ in self._inputs(case)
            if base is not None
        )
        return sum(masks, start=Mask(0, 0, 0))

    def checkpoint_problems(self, case: Case) -> Iterator[str]:
        """What is wrong with our checkpoint as a checkpoint: its files, index and config."""
        directory = self.ours(case)
        if (directory / "model.safetensors").exists():
            yield f"{case.name}: a stale model.safetensors lies in the way"
        own = json.loads((directory / "model.safetensors.index.json").read_text())
        weight_map, total_size = own["weight_map"], own["metadata"]["total_size"]
        shards = {path.name for path in directory.glob("*.safetensors")}
        if odd := sorted(shards ^ set(weight_map.values())):
            yield f"{case.name}: only the index or only the directory has {odd}"
        for shard in sorted(shards):
            with safe_open(directory / shard, framework="pt") as opened:
                if opened.metadata() != {"format": "pt"}:
                    yield f"{case.name}: {shard} has the metadata {opened.metadata()}"
                if set(opened.keys()) != {name for name, held in weight_map.items() if held == shard}:
                    yield f"{case.name}: {shard} does not hold what the index says"
        config = json.loads((directory / "config.json").read_text())
        of_input = json.loads((self.model(case.group + "/base") / "config.json").read_text())
        if {key: config.get(key) for key in of_input.keys() - DTYPE_KEYS} != _without(of_input, DTYPE_KEYS):
            yield f"{case.name}: config.json is not the input's"
        dtype = case.recipe.get("out_dtype", case.recipe["dtype"])
        if {config[key] for key in DTYPE_KEYS & config.keys()} != {dtype}:
            yield f"{case.name}: config.json does not say {dtype}"
        theirs = self.theirs(case)
        index = json.loads((theirs / "model.safetensors.index.json").read_text())
        if odd := sorted(index["weight_map"].keys() ^ weight_map.keys()):
            yield f"{case.name}: only one index has {odd}"
        if "total_size" in index["metadata"] and index["metadata"]["total_size"] != total_size:
            yield f"{case.name}: the index tells of {total_size} bytes, mergekit's {index['metadata']['total_size']}"
        said = json.loads((theirs / "config.json").read_text())
        if odd := sorted(
            key for key in (config.keys() & said.keys()) - DTYPE_KEYS if config[key] != said[key]
        ):
            yield f"{case.name}: mergekit's config.json says otherwise of {odd}"

    def _inputs(
        self, case: Case
    ) -> Iterator[tuple[str, torch.Tensor | None, list[torch.Tensor], list[Mapping[str, Any]]]]:
        """Every tensor: its name, the base's, the models', and the models' parameters."""
        entries = case.recipe["models"]
        models: list[Tensors] = [read_checkpoint(self.model(entry["model"])) for entry in entries]
        base_name = case.recipe.get("base_model")
        base = None if base_name is None else read_checkpoint(self.model(base_name))
        for name in models[0]:
            inputs = [model[name] for model in models]
            yield (
                name,
                None if base is None else base[name],
                inputs,
                [entry["parameters"] for entry in entries],
            )


def _undefined(
    case: Case,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    own: list[Mapping[str, Any]],
) -> torch.Tensor:
    """The elements of a tensor that are nobody's promise."""
    if base is None:
        return torch.zeros(models[0].shape, dtype=torch.bool)
    match case.method:
        case "ties":
            return undefined_by_trim(base, models, [each["density"] for each in own])
        case "breadcrumbs" | "breadcrumbs_ties":
            return undefined_by_band(base, models, own)
        case "arcee_fusion":
            return undefined_by_importance(base, models[0])
        case "sce":
            return undefined_by_variance(
                base, models, case.recipe.get("parameters", {}).get("select_topk", 1.0)
            )
    return torch.zeros(base.shape, dtype=torch.bool)


def _without(values: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
